"""Rewards by name: what users write, and the built-in ones through the same door."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest
import torch

from lvrpo.data.example import Example
from lvrpo.digits.checks import DigitRules
from lvrpo.rewards.parts import RewardParts
from lvrpo.rewards.registry import BUILT_IN, find_reward, load_reward, reward_label
from lvrpo.rewards.reward import RewardError, Samples
from lvrpo.rewards.score import score

IMAGE = np.zeros((1, 8, 8), np.float32)
EXAMPLES = [
    Example("understand", f"q{i}", f"question {i}", image=IMAGE, answer="1") for i in range(3)
]
SAMPLES = Samples.of_texts(EXAMPLES, ["1", "2", "x"])
PARTS = RewardParts(
    options={"strict_weight": 1.0, "semantic_pool": "max", "semantic_implied": False, "mine": 3.0},
    rules=DigitRules(),
    answer_probability=lambda images, questions, answers: torch.ones(len(questions)),
)

MODULE = """
def length(samples):
    return [len(text) for text in samples.texts]

class Constant:
    name = "one"
    may_be_nan = False
    def __call__(self, samples):
        return [1.0] * len(samples)

def partly(samples):
    return [None] * len(samples)
partly.may_be_nan = True
partly.name = "part"

number = 3
"""

#: dataclasses look up the module that a class says it is of.
DATACLASS = """
from __future__ import annotations
from dataclasses import dataclass

@dataclass
class Scaled:
    scale: float = 2.0
    name: str = "scaled"
    may_be_nan: bool = False
    def __call__(self, samples):
        return [self.scale] * len(samples)
"""


@pytest.fixture
def spec(tmp_path, monkeypatch):
    path = tmp_path / "my_own_rewards.py"
    path.write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    yield path
    sys.modules.pop("my_own_rewards", None)


def test_load_reward(spec):
    for where in ("my_own_rewards", str(spec)):
        length = load_reward(f"{where}:length")
        assert (length.name, length.may_be_nan) == ("length", False)
        assert score([length], SAMPLES)[:, 0].tolist() == [1, 1, 1]
        assert load_reward(f"{where}:Constant").name == "one"
        partly = load_reward(f"{where}:partly")
        assert (partly.name, partly.may_be_nan) == ("part", True)


def test_a_reward_file_may_define_dataclasses_and_be_called_like_a_package(tmp_path):
    path = tmp_path / "json.py"
    path.write_text(DATACLASS)
    assert score([load_reward(f"{path}:Scaled")], SAMPLES)[:, 0].tolist() == [2, 2, 2]
    assert sys.modules["json"].__file__ != str(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("length", "expected 'module:function'"),
        ("no_such_module:f", "ModuleNotFoundError"),
        ("no_such_file.py:f", "no file"),
        ("my_own_rewards:nothing", "no attribute 'nothing'"),
        ("my_own_rewards:number", "is a int, expected a function"),
    ],
)
def test_load_reward_says_what_is_wrong(spec, text, message):
    with pytest.raises(RewardError, match=message):
        load_reward(text)


BROKEN = {
    "import json\njson.loads('')\n": r"DecodeError: .*, at {path}:2 \(from .*decoder.py:\d+\)$",
    "import sys\nsys.exit('usage: mine')\n": "SystemExit: usage: mine, at {path}:2$",
    "import absent_package\n": "ModuleNotFoundError: No module named 'absent_package', at {path}:1",
    "def reward(samples:\n": r"SyntaxError: .*mine.py, line 1",
    "class reward:\n    def __init__(self, x):\n        pass\n": (
        "missing a required argument: 'x', expected in rewards.arguments: x$"
    ),
    "class reward:\n    def __init__(self):\n        1 / 0\n": "ZeroDivisionError: .*at {path}:3$",
}


@pytest.mark.parametrize(("code", "message"), BROKEN.items())
@pytest.mark.parametrize("by_file", [True, False])
def test_code_that_cannot_be_loaded_is_named_by_its_line(
    tmp_path, monkeypatch, code, message, by_file
):
    path = tmp_path / "mine.py"
    path.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardError, match=message.format(path=re.escape(str(path)))):
        load_reward(f"{path if by_file else 'mine'}:reward")
    sys.modules.pop("mine", None)


FACTORY = """
class Scaled:
    may_be_nan = False
    needs = ("options",)

    def __init__(self, scale):
        self.name, self.scale = "scaled", scale

    @classmethod
    def from_parts(cls, parts):
        return cls(parts.options["mine"])

    def __call__(self, samples):
        return [self.scale] * len(samples)

class Mistaken(Scaled):
    needs = ("options", "nonsense")

class Odd:
    @classmethod
    def from_parts(cls, parts):
        return parts.absent
"""


def test_a_reward_of_yours_is_made_from_the_parts_of_a_run(tmp_path):
    path = tmp_path / "factory.py"
    path.write_text(FACTORY)
    found = find_reward(f"{path}:Scaled")
    assert found.needs == {"options"}
    assert score([found.make(PARTS)], SAMPLES)[:, 0].tolist() == [3, 3, 3]
    with pytest.raises(RewardError, match=r"Scaled' is made from the parts of a run"):
        found.make()
    with pytest.raises(RewardError, match=r"AttributeError: .*absent.*, at .*factory\.py:22$"):
        load_reward(f"{path}:Odd", PARTS)
    with pytest.raises(RewardError, match="needs 'nonsense', which is no part of a run; expected"):
        load_reward(f"{path}:Mistaken", PARTS)


@pytest.mark.parametrize("name", [name for name in BUILT_IN if name.startswith("r_")])
def test_a_built_in_reward_goes_through_the_same_door(name):
    found = find_reward(name)
    assert found.needs
    assert type(find_reward(BUILT_IN[name])) is type(found)
    if "encoder" in found.needs:
        with pytest.raises(RewardError, match="needs an encoder"):
            found.make(PARTS)
        return
    reward = found.make(PARTS)
    assert reward.name == name
    column = score([reward], SAMPLES)[:, 0]
    assert column[0] == 1 or column.isnan().all()


def test_a_class_takes_arguments(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(DATACLASS + MODULE)
    reward = load_reward(f"{path}:Scaled", arguments={"scale": 3.0})
    assert score([reward], SAMPLES)[:, 0].tolist() == [3, 3, 3]
    with pytest.raises(RewardError, match=r"argument 'size', expected in rewards.arguments: scale"):
        load_reward(f"{path}:Scaled", arguments={"size": 3})
    with pytest.raises(RewardError, match=r":length' takes no arguments: it is no class"):
        load_reward(f"{path}:length", arguments={"size": 3})
    with pytest.raises(RewardError, match=r"'r_ins' takes no arguments: .* made of parts"):
        load_reward("r_ins", PARTS, arguments={"strict_weight": 1.0})


def test_labels_have_no_folders():
    assert reward_label("some/where/mine.py:brief") == "mine.py:brief"
    assert reward_label("r_ins") == "r_ins"
