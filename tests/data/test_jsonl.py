from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from lvrpo.data import jsonl
from lvrpo.data.jsonl import DataError, JsonlExamples
from lvrpo.digits.rules import LayoutRule, parse_rule

SHAPE = (1, 16, 16)
QUESTION = {"task": "understand", "prompt": "what is it", "image": "a.png", "answer": "3"}
DRAWING = {"task": "generate", "prompt": "draw 3 at top-left"}


@pytest.fixture
def write(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(np.stack([pixels, pixels * 0, pixels], axis=2)).save(tmp_path / "colour.png")
    Image.fromarray(pixels.astype(np.uint16)).save(tmp_path / "deep.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:45])
    (tmp_path / "text.png").write_text("hello")

    def write(*lines):
        path = tmp_path / "data.jsonl"
        path.write_text(
            "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
        )
        return path

    return write


def test_both_tasks(write):
    rule = {"kind": "layout", "rows": 2, "cols": 2, "digits": [3, None, None, None]}
    path = write(
        QUESTION | {"id": "first", "kind": "name"},
        "\n",
        DRAWING | {"rule": rule, "target": "a.png", "answer": None},
    )
    question, drawing = JsonlExamples(path, SHAPE, parse_rule=parse_rule)
    assert (question.uid, question.kind, question.answer) == ("first", "name", "3")
    assert question.image.dtype == np.float32
    np.testing.assert_array_equal(question.image[0] * 255, np.arange(256).reshape(16, 16))
    assert drawing.uid == "data:3"
    assert drawing.rule == LayoutRule(2, 2, (3, None, None, None))
    np.testing.assert_array_equal(drawing.target, question.image)


def test_pictures_get_the_channels_and_size_of_the_model(write):
    path = write(QUESTION, QUESTION | {"image": "colour.png"})
    examples = JsonlExamples(path, (3, 8, 24))
    assert len(examples) == 2
    assert [example.image.shape for example in examples[:]] == [(3, 8, 24)] * 2
    gray, colour = (example.image for example in examples)
    assert (gray[0] == gray[1]).all()
    assert colour[1].max() == 0
    assert colour[0].max() > 0.5
    assert gray.min() >= 0
    assert gray.max() <= 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops\n", "not JSON: JSONDecodeError"),
        ("[1, 2]\n", "expected a JSON object"),
        (QUESTION | {"anwser": "4"}, "field 'anwser' is unknown, 'answer' was probably meant"),
        (DRAWING | {"Target": "a.png"}, "field 'Target' is unknown, 'target' was probably meant"),
        (QUESTION | {"prompt": ""}, "field 'prompt' is '', expected at least one word"),
        (DRAWING | {"prompt": " \t"}, "field 'prompt' is ' \\t', expected at least one word"),
        (QUESTION | {"answer": "\n"}, "field 'answer' is '\\n', expected at least one word"),
        (QUESTION | {"answer": []}, "field 'answer' is [], expected at least one answer"),
        (QUESTION | {"answer": ["3", ""]}, "'answer' is ['3', ''], expected at least one word"),
        (QUESTION | {"answer": 0.5}, "'answer' is 0.5, expected a string, an integer, or a list"),
        (QUESTION | {"answer": True}, "'answer' is True, expected a string, an integer, or"),
        (QUESTION | {"answer": {"is": 3}}, "expected a string, an integer, or a list of them"),
        ({"task": "understand"}, "field 'prompt' is missing"),
        ({"prompt": "what"}, "field 'task' is missing"),
        (QUESTION | {"task": "edit"}, "field 'task' is 'edit', expected one of understand"),
        (QUESTION | {"prompt": 3}, "field 'prompt' is 3, expected a string"),
        (QUESTION | {"answer": None}, "field 'answer' is missing, task 'understand' needs it"),
        (DRAWING | {"answer": "a"}, "field 'answer' does not belong to task 'generate'"),
        (DRAWING | {"rule": "two"}, "field 'rule' is 'two', expected an object"),
        (DRAWING | {"rule": {"kind": "sum"}}, "field 'rule' sum rule lacks 'total'"),
        (
            DRAWING | {"rule": {"kind": "layout", "rows": 1, "cols": 1, "digits": [3]}},
            "field 'rule' is for 1 x 1 cells of 8 pixels, the model draws 16 x 16",
        ),
        (QUESTION | {"image": "none.png"}, "field 'image' there is no file"),
        (QUESTION | {"image": "broken.png"}, "field 'image' cannot read"),
        (QUESTION | {"image": "text.png"}, "field 'image' cannot read"),
        (QUESTION | {"image": "deep.png"}, "expected 8 bits per channel"),
        (DRAWING | {"target": "."}, "field 'target' there is no file"),
        (QUESTION | {"id": "x"}, "field 'id' 'x' is already used on line 1"),
    ],
)
def test_an_error_is_one_line_with_file_line_and_field(write, line, message):
    path = write(QUESTION | {"id": "x"}, line)
    with pytest.raises(DataError) as error:
        JsonlExamples(path, SHAPE, parse_rule=parse_rule)
    text = str(error.value)
    assert text.startswith(f"{path}:2: ")
    assert message in text
    assert "\n" not in text


def test_a_rule_that_nobody_can_read_is_refused(write):
    path = write(DRAWING, DRAWING | {"rule": {"kind": "sum", "total": 9}})
    with pytest.raises(DataError, match=r":2: field 'rule' cannot be read: .* no parse_rule"):
        JsonlExamples(path, SHAPE)


def test_a_picture_that_disappears_later_is_reported_the_same_way(write, tmp_path):
    examples = JsonlExamples(write(QUESTION), SHAPE, kept_bytes=0)
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"data\.jsonl:1: field 'image' there is no file"):
        examples[0]


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_a_file_is_decoded_once_and_kept_as_bytes_while_there_is_room(write, monkeypatch, room):
    decoded = []

    def counted(path, shape):
        decoded.append(path.name)
        return load_pixels(path, shape)

    load_pixels = jsonl.load_pixels
    monkeypatch.setattr(jsonl, "load_pixels", counted)
    names = ("a.png", "colour.png")
    lines = [QUESTION | {"image": name, "answer": str(i)} for i in range(5) for name in names]
    size = int(np.prod(SHAPE))
    examples = JsonlExamples(write(*lines), SHAPE, kept_bytes=room * size)
    kept = min(room, len(names))
    assert len(decoded) == kept + 5 * (len(names) - kept)
    assert sum(pixels.nbytes for pixels in examples._kept.values()) == kept * size
    decoded.clear()
    again = [example.image for example in examples]
    assert decoded == [name for _ in range(5) for name in names[kept:]]
    for i, image in enumerate(again):
        np.testing.assert_array_equal(image, again[i % 2])


def test_columns_of_the_users_own_come_along(write):
    mine = {"target_text": "stop", "colours": ["red", {"of": 2}], "size": None}
    drawing, plain = JsonlExamples(write(DRAWING | mine, DRAWING), SHAPE)
    assert drawing.extra == mine
    assert plain.extra == {}


def test_several_answers_are_right_and_a_number_is_one(write):
    path = write(
        QUESTION | {"answer": ["3", "three"]}, QUESTION | {"answer": 3}, QUESTION | {"answer": [-3]}
    )
    examples = JsonlExamples(path, SHAPE)
    assert [example.answers for example in examples] == [("3", "three"), ("3",), ("-3",)]
    assert [example.answer for example in examples] == ["3", "3", "-3"]


def test_files_that_hold_nothing(write, tmp_path):
    with pytest.raises(DataError, match="holds no examples"):
        JsonlExamples(write("\n"), SHAPE)
    with pytest.raises(DataError, match="No such file"):
        JsonlExamples(tmp_path / "none.jsonl", SHAPE)
    (tmp_path / "latin.jsonl").write_bytes(b"\n\xff\n")
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not UTF-8"):
        JsonlExamples(tmp_path / "latin.jsonl", SHAPE)
    with pytest.raises(ValueError, match="2 channels"):
        JsonlExamples(write(QUESTION), (2, 16, 16))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('"prompt": "q", "prompt": "z", "answer": "a"', "'prompt' stands there more than once"),
        ('"prompt": "q", "answer": "a", "box": {"x": 1, "x": 2}', "'x' stands there more than"),
        *(
            (f'"prompt": "q", "answer": "a", "weight": [{word}]', f"{word}, expected a number, or")
            for word in ("NaN", "Infinity", "-Infinity")
        ),
        *(
            (f'"prompt": "q", "answer": "a", {field}', "surrogates not allowed")
            for field in (r'"note": "\ud83d"', r'"note": ["\uDE00"]', r'"\ud83d": 1')
        ),
    ],
)
def test_lines_that_readers_of_json_take_for_different_things(write, tmp_path, line, message):
    path = tmp_path / "said.jsonl"
    path.write_text('{"task": "understand", ' + line + "}\n")
    with pytest.raises(DataError, match=message) as error:
        JsonlExamples(path, SHAPE)
    assert str(error.value).startswith(f"{path}:1: not JSON: ")


def test_a_pair_of_surrogates_is_a_letter(tmp_path):
    path = tmp_path / "said.jsonl"
    path.write_text(r'{"task": "understand", "prompt": "\ud83d\ude00", "answer": "a"}')
    assert JsonlExamples(path, SHAPE)[0].prompt == "\U0001f600"


def test_a_name_that_no_file_can_have(write):
    with pytest.raises(DataError, match=r"field 'image' cannot read .*: File name too long"):
        JsonlExamples(write(QUESTION | {"image": "a" * 5000}), SHAPE)


def test_several_pictures_and_videos(write, tmp_path):
    seen = {"prompt": "is <image> this", "images": ["a.png", "colour.png"]}
    film = {"prompt": "<video> what", "videos": [["a.png", "colour.png"], ["a.png"]], "fps": 4}
    bare = {"task": "understand", "answer": "3"}
    two, films, slow = JsonlExamples(
        write(bare | seen, bare | film, bare | film | {"fps": None}), (3, 0, 0)
    )
    single, colour = JsonlExamples(write(QUESTION, QUESTION | {"image": "colour.png"}), (3, 0, 0))
    assert [len(example.images) for example in (two, films)] == [2, 0]
    np.testing.assert_array_equal(two.images, [single.image, colour.image])
    assert [(len(video.frames), video.fps) for video in films.videos] == [(2, 4.0), (1, 4.0)]
    np.testing.assert_array_equal(films.videos[0].frames, [single.image, colour.image])
    assert [video.fps for video in slow.videos] == [jsonl.FPS] * 2
    assert not films.extra
    assert jsonl.picture_files(seen | film) == {"a.png", "colour.png"}
    assert jsonl.picture_files(QUESTION | {"target": "b.png"}) == {"a.png", "b.png"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "field 'images' is [], expected a list of files"),
        ({"images": "a.png"}, "field 'images' is 'a.png', expected a list of files"),
        ({"images": ["a.png", "none.png"]}, "field 'images' there is no file"),
        ({"images": ["a.png"], "image": "a.png"}, "'images' stands beside 'image', expected one"),
        (
            {"images": ["a.png"], "prompt": "<image> or <image>"},
            "field 'prompt' has 2 <image> in the prompt and 1 pictures, expected a picture for eac",
        ),
        (
            {"images": ["a.png"], "prompt": "<video>"},
            "field 'prompt' has 1 <video> in the prompt and 0 videos, expected a video for each",
        ),
        ({"videos": ["a.png"]}, "field 'videos' is ['a.png'], expected a list of videos, each a l"),
        ({"videos": [[]]}, "field 'videos' is [[]], expected a list of videos"),
        ({"videos": [["a.png", "wide.png"]]}, "has frames of 16 x 16 and 8 x 16 pixels, expected"),
        ({"videos": [["a.png"]], "fps": 0}, "field 'fps' is 0, expected the frames a second"),
        ({"videos": [["a.png"]], "fps": True}, "field 'fps' is True, expected the frames a second"),
        ({"image": "a.png", "fps": 2}, "field 'fps' is of videos, of which the line has none"),
        ({"task": "generate", "answer": None, "videos": [["a.png"]]}, "does not belong to task 'g"),
        ({"vidoes": [["a.png"]]}, "field 'vidoes' is unknown, 'videos' was probably meant"),
    ],
)
def test_pictures_and_videos_that_cannot_be_read(write, tmp_path, change, message):
    Image.fromarray(np.zeros((8, 16), np.uint8)).save(tmp_path / "wide.png")
    path = write({"task": "understand", "prompt": "what", "answer": "3"} | change)
    with pytest.raises(DataError) as error:
        JsonlExamples(path, (3, 0, 0))
    assert str(error.value).startswith(f"{path}:1: field ")
    assert message in str(error.value)


def test_a_picture_to_be_edited(write):
    edit, edits = JsonlExamples(
        write(DRAWING | {"image": "a.png"}, DRAWING | {"images": ["a.png", "colour.png"]}), SHAPE
    )
    assert [len(example.images) for example in (edit, edits)] == [1, 2]
    np.testing.assert_array_equal(edit.image[0] * 255, np.arange(256).reshape(16, 16))


def test_marks_without_pictures_are_words_of_a_text(write):
    (example,) = JsonlExamples(write(QUESTION | {"image": None, "prompt": "a <video> tag"}), SHAPE)
    assert example.prompt == "a <video> tag"
