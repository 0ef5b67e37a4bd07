"""`lvrpo sample` and `report`: what was not understood is said, and no file is replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from runs.test_bad_input import refused
from runs.tiny import command

from lvrpo.data.jsonl import DataError
from lvrpo.digits.phrases import scene_words
from lvrpo.runs.directory import RunDirectoryError
from lvrpo.runs.inference import output_paths, prompt_notes

KNOWN = scene_words()
DRAW = "draw 3 at top-left"


def notes_of(prompt: str, *, image: bool = False) -> list[str]:
    return prompt_notes(KNOWN, prompt, is_drawn=not image)


@pytest.mark.parametrize(
    ("prompt", "image", "expected"),
    [
        (DRAW, False, []),
        ("what digit is at top-left", True, []),
        ("what digit is at top-left", False, ["reads like a question"]),
        ("draw 3 at top-left?", False, ["reads like a question"]),
        (DRAW, True, ["reads like a request to draw"]),
        ("draww 3 at topleft", False, ["'draww' is no word", "'topleft' is no word"]),
        ("DRAW 3", False, ["'DRAW' is no word"]),
        ("画 3", False, ["'画' is no word"]),
        ("!?", True, ["has no words"]),
        ("x1 x2 x3 x4 x5 x6 x7", False, [*(f"'x{i}'" for i in range(1, 6)), "and 2 more words"]),
    ],
)
def test_what_was_not_understood_is_named(prompt, image, expected):
    found = notes_of(prompt, image=image)
    assert len(found) == len(expected)
    for note, words in zip(found, expected, strict=True):
        assert words in note


def test_the_nearest_words_are_named():
    assert "which has 'draw'" in notes_of("draww 3")[0]
    assert "which has 'draw'" in notes_of("DRAW 3")[0]
    assert "'top-left'" in notes_of("draw 3 at topleft")[0]


@pytest.mark.parametrize("prompt", ["", " ", "\t\n"])
def test_an_empty_prompt_is_refused(prompt, trained, tmp_path):
    with pytest.raises(DataError, match="expected what to draw, or a question"):
        notes_of(prompt)
    message = refused("sample", trained, prompt, "-o", tmp_path / "x.png")
    assert "expected what to draw, or a question" in message
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(KNOWN), min_size=1, max_size=8), st.integers(0, 8), st.data())
def test_any_word_that_is_not_known_is_named_and_no_other(words, at, data):
    strange = data.draw(st.text(st.characters(categories=["Ll"]), min_size=1, max_size=9))
    known = [word for word in KNOWN if word != strange]
    prompt = " ".join([*words[:at], strange, *words[at:]])
    notes = [
        note
        for note in prompt_notes(known, prompt, is_drawn=True)
        if "is no word of the training data" in note
    ]
    assert len(notes) == 1
    assert notes[0].startswith(repr(strange))


def test_notes_go_to_standard_error_and_the_drawing_is_made(trained, tmp_path):
    result = command("sample", trained, "draww 3", "-o", tmp_path / "a.png")
    assert result.exit_code == 0
    assert result.stdout == f"{tmp_path / 'a.png'}\n"
    assert result.stderr.startswith("lvrpo: note: 'draww' is no word of the training data, which")


def test_a_drawing_replaces_no_file(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("drawing.png", "drawing-2.png", "drawing-3.png"):
        assert command("sample", trained, DRAW).stdout == f"{name}\n"
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert command("sample", trained, DRAW, "-n", 2).stdout == "drawing-4.png\ndrawing-5.png\n"
    assert "drawing-2.png: is there already" in refused(
        "sample", trained, DRAW, "-o", "drawing-2.png"
    )
    assert (
        "drawing-1.png" in command("sample", trained, DRAW, "-n", 1, "-o", "drawing-1.png").stdout
    )
    assert "drawing-1.png: is there already" in refused(
        "sample", trained, DRAW, "-n", 3, "-o", "drawing.png"
    )
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


@pytest.mark.parametrize("name", ["a", "a.txt", "a.jsonl", "no/a.png", "a.", ".png"])
def test_what_cannot_be_written_is_said_before_anything_is_drawn(name, tmp_path):
    """The run is not even looked at: it is not there."""
    output = tmp_path / name
    assert f"{output}: cannot be written" in refused("sample", tmp_path, DRAW, "-o", output)


@settings(max_examples=100, deadline=None)
@given(
    there=st.sets(st.integers(1, 8)),
    count=st.integers(1, 5),
    named=st.booleans(),
)
def test_paths_are_new_and_distinct(there, count, named, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for i in there:
            (folder / ("drawing.png" if i == 1 else f"drawing-{i}.png")).touch()
        before = set(folder.iterdir())
        try:
            paths = output_paths(Path("drawing.png") if named else None, count)
        except RunDirectoryError:
            assert named
            return
        assert len(set(paths)) == count
        assert not before & {folder / path for path in paths}


def test_a_page_elsewhere_leaves_the_run_alone(trained, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    page = tmp_path / "mine.html"
    result = command("report", trained, "--compare", trained, "--output", page)
    assert result.stdout == f"report: {page}\n"
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert list((tmp_path / "mine").glob("*.png"))
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    assert "expected a name with an ending" in refused("report", trained, "-o", tmp_path / "page")
    assert str(tmp_path / "no") in refused("report", trained, "-o", tmp_path / "no" / "page.html")


def test_an_answer_has_no_file(trained, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("L", (32, 32)).save(picture)
    asked = ("sample", trained, "what digit is at top-left", "--image", picture)
    message = refused(*asked, "-o", tmp_path / "answer.png")
    assert "answer.png, expected none: the prompt is answered" in message
    assert command(*asked).stdout.strip()
