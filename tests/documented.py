"""Pages whose tables are what their own programs print."""

from __future__ import annotations

import re
from pathlib import Path


class Page:
    """A page of docs/, by its name."""

    def __init__(self, name: str) -> None:
        path = Path(__file__).parents[1] / "docs" / name
        self.text = path.read_text(encoding="utf-8")

    def printed(self, word: str, capsys) -> list[str]:
        """Lines that the page's one program with this word prints."""
        programs = re.findall(r"^```py\n(.*?)^```$", self.text, re.M | re.S)
        (program,) = (code for code in programs if word in code)
        exec(program, {})
        return capsys.readouterr().out.splitlines()

    def rows(self, first: str) -> list[list[str]]:
        """Cells of the table whose header begins so, line by line."""
        table = self.text[self.text.index(first) :].partition("\n\n")[0].splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
