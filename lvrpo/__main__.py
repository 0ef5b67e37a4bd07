"""`lvrpo`, as a command and as `python -m lvrpo`: sees that what it needs is installed, then runs.

The ops need torch only, so the command may be there without the packages of its extra.
"""

from __future__ import annotations

import sys

from lvrpo import info


def main() -> None:
    """Run the command; missing packages end it with one line and exit code 2, before anything."""
    if sys.argv[1:] == ["info"]:  # tells what is missing, and must not need it
        print(info.describe())
        return
    try:
        info.require(*info.packages_of("train"))
        from lvrpo.cli import main as command

        command()
    except ModuleNotFoundError as error:
        if (error.name or "lvrpo").partition(".")[0] == "lvrpo":
            raise
        said = str(error)
        if not said.endswith(tuple(info.INSTALL.values())):
            # One that a package of an extra needs itself is named by Python alone.
            said += f"; {info.INSTALL['train']}"
        print(f"lvrpo: {said}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
