from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lvrpo.data.example import Example, Video, shown_hash
from lvrpo.data.marks import IMAGE_MARK, VIDEO_MARK, parts_of, words_of_parts


def numbered(number: int) -> np.ndarray:
    return np.full((1, 2, 2), number, np.float32)


WORDS = st.text("ab <>", max_size=5)


@given(
    pieces=st.lists(st.one_of(WORDS, st.sampled_from([IMAGE_MARK, VIDEO_MARK])), max_size=8),
    first=st.tuples(st.integers(0, 2), st.integers(0, 2)),
)
def test_pictures_are_read_in_their_order_where_they_are_marked(pieces, first):
    """Against a reader that walks over the characters."""
    prompt = "".join(pieces)
    counts = [
        n + prompt.count(mark) for n, mark in zip(first, (IMAGE_MARK, VIDEO_MARK), strict=True)
    ]
    images = [numbered(n) for n in range(counts[0])]
    videos = [Video(numbered(n)[None], 2.0) for n in range(counts[1])]
    example = Example(
        "understand",
        "u",
        prompt,
        image=images[0] if images else None,
        answer="yes",
        further_images=tuple(images[1:]),
        videos=tuple(videos),
    )
    expected = [("image", n) for n in range(first[0])] + [("video", n) for n in range(first[1])]
    after, at = list(first), 0
    while at < len(prompt):
        kinds = [prompt.startswith(mark, at) for mark in (IMAGE_MARK, VIDEO_MARK)]
        if any(kinds):
            which = kinds.index(True)
            expected.append((("image", "video")[which], after[which]))
            after[which] += 1
            at += len(IMAGE_MARK)
            continue
        if expected and expected[-1][0] == "words":
            expected[-1] = ("words", expected[-1][1] + prompt[at])
        else:
            expected.append(("words", prompt[at]))
        at += 1
    found = []
    for part in parts_of(example):
        if isinstance(part, str):
            found.append(("words", part))
        elif isinstance(part, Video):
            found.append(("video", int(part.frames.max())))
        else:
            found.append(("image", int(part.max())))
    assert found == expected
    assert words_of_parts(example) == [words for kind, words in expected if kind == "words"]


def test_a_mark_without_a_picture():
    example = Example("understand", "u", "<image> <image>", image=numbered(1), answer="yes")
    with pytest.raises(ValueError, match="2 <image> in the prompt and 1 pictures, expected a pic"):
        parts_of(example)


def test_what_is_shown_is_told_apart():
    """By every picture, their order, the speed of a video, and what is a video."""

    def shown(*images: int, videos: tuple[Video, ...] = ()) -> Example:
        pictures = [numbered(n) for n in images]
        return Example(
            "understand",
            "u",
            "what",
            image=pictures[0] if pictures else None,
            answer="yes",
            further_images=tuple(pictures[1:]),
            videos=videos,
        )

    film = Video(np.stack([numbered(0), numbered(1)]), 2.0)
    different = [shown(0), shown(1), shown(0, 1), shown(1, 0), shown(0, videos=(film,))]
    different += [shown(videos=(film,)), shown(videos=(film._replace(fps=4.0),))]
    assert len({shown_hash(example) for example in different}) == len(different)
    assert shown_hash(shown(0, 1)) == shown_hash(shown(0, 1))
