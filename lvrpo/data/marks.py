"""Where the pictures and videos of a prompt stand among its words."""

from __future__ import annotations

import re
from typing import TypeAlias

from lvrpo.data.example import Example, Picture, Video

#: Where a picture, or a video, of a prompt stands in its words.
IMAGE_MARK, VIDEO_MARK = "<image>", "<video>"
#: What is read of a prompt, one part after the other.
Part: TypeAlias = str | Picture | Video


def parts_of(example: Example) -> list[Part]:
    """The words, pictures and videos of a prompt, in the order in which they are read.

    Marks are for the last pictures and videos; those that no mark is for come before all words,
    pictures first.

    Raises:
        ValueError: there are more marks than pictures or videos.
    """
    check_marks(example.prompt, images=len(example.images), videos=len(example.videos))
    shown: dict[str, list[Picture] | list[Video]] = {
        IMAGE_MARK: list(example.images),
        VIDEO_MARK: list(example.videos),
    }
    parts: list[Part] = []
    for mark, its in shown.items():
        unmarked = len(its) - example.prompt.count(mark)
        parts += its[:unmarked]
        del its[:unmarked]
    for words in re.split(f"({IMAGE_MARK}|{VIDEO_MARK})", example.prompt):
        if words in shown:
            parts.append(shown[words].pop(0))
        elif words:
            parts.append(words)
    return parts


def check_marks(prompt: str, *, images: int, videos: int) -> None:
    """See that there is a picture for every mark.

    Args:
        prompt: with marks.
        images: that it has.
        videos: that it has.

    Raises:
        ValueError: there is none for one of them.
    """
    for mark, name, count in ((IMAGE_MARK, "picture", images), (VIDEO_MARK, "video", videos)):
        marks = prompt.count(mark)
        if marks > count:
            raise ValueError(
                f"{marks} {mark} in the prompt and {count} {name}s, expected a {name} for each"
            )


def words_of_parts(example: Example) -> list[str]:
    """The words of a prompt, without its marks, as the pictures divide them."""
    return [part for part in parts_of(example) if isinstance(part, str)]
