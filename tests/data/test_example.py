from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest

from lvrpo.data.example import Example, Video, check_disjoint, cluster_of, picture_hash


@dataclass(frozen=True)
class Colour:
    """A rule that nobody else knows."""

    key: str


RED = Colour("red")


def test_example_holds_what_its_task_needs():
    picture = np.zeros((1, 16, 16), np.float32)
    with pytest.raises(ValueError, match="needs 'answer'"):
        Example("understand", "a", "what", image=picture)
    with pytest.raises(ValueError, match="takes no 'answer'"):
        Example("generate", "a", "draw", answer="x")
    with pytest.raises(ValueError, match="takes no 'videos'"):
        Example("generate", "a", "draw", videos=(Video(picture[None], 2.0),))
    with pytest.raises(ValueError, match="'further_images' without an 'image'"):
        Example("generate", "a", "draw", further_images=(picture,))
    with pytest.raises(ValueError, match="takes no 'other_answers'"):
        Example("generate", "a", "draw", other_answers=("x",))
    with pytest.raises(ValueError, match="task is 'edit'"):
        Example("edit", "a", "what")  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Example("generate", "a", "draw").prompt = "other"  # type: ignore[misc]


def test_overlap_is_found_by_content_not_by_name():
    def drawing(uid, prompt):
        return Example("generate", uid, prompt, rule=RED)

    train, test = [drawing("a", "3 and 7")], [drawing("b", "7 and 3")]
    check_disjoint({"train": train, "test": [drawing("c", "x") for _ in range(0)]})
    with pytest.raises(ValueError, match=r"'b' of test is also 'a' of train: the same rule"):
        check_disjoint({"train": train, "test": test})
    check_disjoint({"train": [*train, *train]})  # a repeat inside a split is no overlap


def test_what_gives_an_answer_or_a_drawing_away_is_an_overlap_and_a_wording_is_not():
    dark, light = (np.full((1, 4, 4), shade, np.float32) for shade in (0.0, 1.0))

    def question(prompt, image):
        return Example("understand", f"q {prompt}", prompt, image=image, answer="yes")

    def drawing(prompt, target=None, rule=None, image=None):
        return Example("generate", f"d {prompt}", prompt, target=target, rule=rule, image=image)

    for ours, theirs in [
        (question("is it dark", dark), question("is it dark", light)),
        (question("is it dark", dark), question("is it light", dark)),
        (drawing("a boot", dark), drawing("a boot", light)),
        (drawing("a boot", dark), drawing("a shoe", dark)),
        (drawing("a boot", dark), drawing("a boot")),
        (drawing("a boot"), drawing("a boot")),
        (drawing("a boot", rule=RED), drawing("a boot", dark)),
        (drawing("lighter", light, image=dark), drawing("lighter", light, image=light)),
        (drawing("lighter", light, image=dark), drawing("lighter", light)),
        (drawing("red", rule=RED, image=dark), drawing("red", rule=RED, image=light)),
        (drawing("lighter", image=dark), drawing("lighter", image=dark)),
    ]:
        check_disjoint({"train": [ours], "test": [theirs]})
    for ours, theirs, shared in [
        (question("is it dark", dark), question("is it dark", dark.copy()), "question and picture"),
        (drawing("a boot", dark), drawing("a boot", dark.copy()), "wording and target"),
        (drawing("a boot", dark, RED), drawing("a shoe", light, RED), "rule"),
        (
            drawing("lighter", light, image=dark),
            drawing("lighter", light, image=dark.copy()),
            "wording and target of one picture to be edited",
        ),
        (
            drawing("red", rule=RED, image=dark),
            drawing("in red", rule=RED, image=dark),
            "rule of one picture to be edited",
        ),
    ]:
        with pytest.raises(ValueError, match=f"also '.*' of train: the same {shared}$"):
            check_disjoint({"train": [ours], "test": [theirs]})


def test_picture_hash_sees_every_pixel_and_the_shape():
    picture = np.zeros((1, 4, 4), np.float32)
    other = picture.copy()
    other[0, 3, 3] = 0.01
    hashes = {picture_hash(picture), picture_hash(other), picture_hash(picture.reshape(1, 2, 8))}
    assert len(hashes) == 3


def test_a_cluster_is_a_picture_a_rule_or_a_wording_unless_it_is_named():
    dark, light = (np.full((1, 4, 4), shade, np.float32) for shade in (0.0, 1.0))
    prompts = [
        Example("understand", "a", "is it dark", image=dark, answer="yes"),
        Example("understand", "b", "is it light", image=dark.copy(), answer="no"),
        Example("understand", "c", "is it dark", image=light, answer="no"),
        Example("generate", "d", "a boot", rule=RED),
        Example("generate", "e", "a shoe", rule=RED, target=dark),
        Example("generate", "f", "a boot", target=dark),
        Example("generate", "g", "a boot", target=light),
        Example("generate", "h", "a shoe", target=light),
        Example("generate", "i", "a boot", image=np.full((1, 4, 4), 0.5, np.float32)),
        Example("generate", "j", "a shoe", image=np.full((1, 4, 4), 0.5, np.float32)),
    ]
    found = [cluster_of(example) for example in prompts]
    groups = [{i for i, c in enumerate(found) if c == cluster} for cluster in dict.fromkeys(found)]
    assert groups == [{0, 1}, {2}, {3, 4}, {5, 6}, {7}, {8, 9}]
    named = [dataclasses.replace(example, cluster="mine") for example in prompts]
    assert {cluster_of(example) for example in named} == {"mine"}
