"""What counts as a word of a text, in any script."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable

# Letters and digits of any script, and the marks that belong to them: without the vowel signs a
# Hindi or Thai word would fall apart. All scripts with such marks in wide use lie below U+3100.
_MARKS = "".join(
    chr(code) for code in range(0x300, 0x3100) if unicodedata.category(chr(code)).startswith("M")
)
_LETTERS = rf"(?:[^\W_]|[{_MARKS}])+"
#: A word is a whole run of these characters, so two neighbouring words had a gap between them.
WORD = re.compile(rf"({_LETTERS}(?:-{_LETTERS})*)")


def words_of(text: str) -> list[str]:
    """The runs of letters and digits, maybe joined by hyphens."""
    return WORD.findall(text)


def common_words(texts: Iterable[str], most: int = 4096) -> list[str]:
    """The most frequent words, by count and then by spelling."""
    counts = Counter(word for text in texts for word in words_of(text))
    return [word for word, _ in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0]))[:most]]
