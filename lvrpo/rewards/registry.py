"""Rewards by name: those that come with lvrpo, and yours, through one door.

A name is "package.module:attribute" or "path/to/file.py:attribute"; the built-in ones have short
names as well.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from lvrpo.rewards._calls import frame_of
from lvrpo.rewards.parts import RewardParts
from lvrpo.rewards.reward import FunctionReward, Reward, RewardError

#: Short names.
BUILT_IN = {
    "r_ins": "lvrpo.rewards.answers:RuleReward",
    "r_sem": "lvrpo.rewards.semantic:SemanticReward",
    "r_kn": "lvrpo.rewards.knowledge:KnowledgeReward",
    "format": "lvrpo.rewards.formats:FormatReward",
    "exact": "lvrpo.rewards.matching:ExactReward",
    "normalized": "lvrpo.rewards.matching:NormalizedReward",
    "contains": "lvrpo.rewards.matching:ContainsReward",
    "anls": "lvrpo.rewards.matching:TextDistanceReward",
    "number": "lvrpo.rewards.matching:NumberReward",
    "count": "lvrpo.rewards.matching:CountReward",
    "choice": "lvrpo.rewards.matching:ChoiceReward",
    "color": "lvrpo.rewards.matching:ColorReward",
    "position": "lvrpo.rewards.matching:PositionReward",
    "boxes": "lvrpo.rewards.boxes:BoxReward",
    "ocr": "lvrpo.rewards.ocr:OcrReward",
    "siglip": "lvrpo.rewards.siglip:SiglipReward",
    "vqa": "lvrpo.rewards.vqa:VqaReward",
    "geneval": "lvrpo.rewards.detection:DetectorReward",
    "http": "lvrpo.rewards.remote:HttpReward",
}


@dataclass(frozen=True)
class FoundReward:
    """A reward that is imported, and not made yet where it needs parts of a run.

    Attributes:
        name: that it was found by.
        found: a reward, or a class with `from_parts`.
    """

    name: str
    found: Any

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `RewardParts` that it cannot do without."""
        return frozenset(getattr(self.found, "needs", ()))

    def make(self, parts: RewardParts | None = None) -> Reward:
        """The reward, made from the parts of a run if it wants any.

        Raises:
            RewardError: it wants parts and there are none, or it cannot be made from them.
        """
        from_parts = getattr(self.found, "from_parts", None)
        if from_parts is None:
            return _as_reward(self.name, self.found)
        if parts is None:
            raise RewardError(f"reward {self.name!r} is made from the parts of a run: give them")
        known = {field.name for field in dataclasses.fields(RewardParts)}
        if strange := sorted(self.needs - known):
            raise RewardError(
                f"reward {self.name!r} needs {strange[0]!r}, which is no part of a run; expected "
                f"some of {', '.join(sorted(known))}"
            )
        return _as_reward(self.name, _guarded(self.name, lambda: from_parts(parts)))


def find_reward(name: str, arguments: Mapping[str, Any] | None = None) -> FoundReward:
    """Import a reward; a plain class of rewards is instantiated here, once.

    The attribute is a reward, a class of rewards, a class with a class method `from_parts`, or a
    plain function from `Samples` to numbers; a function may set `name` and `may_be_nan` as its own
    attributes.

    Args:
        name: a short name of `BUILT_IN`, "package.module:attribute" or "path/to/file.py:attribute".
        arguments: of a plain class; None for none.

    Raises:
        RewardError: it cannot be imported or made, is not there, or cannot be called; or there are
            arguments and it is no plain class.
    """
    spec = BUILT_IN.get(name, name)
    where, separator, attribute = spec.rpartition(":")
    if not separator or not where or not attribute:
        raise RewardError(
            f"reward {name!r}: expected 'module:function' or 'file.py:function', or one of "
            f"{', '.join(BUILT_IN)}"
        )

    def load() -> Any:
        module = _import_file(Path(where)) if _is_file(where) else importlib.import_module(where)
        found: Any = getattr(module, attribute, None)
        is_plain = isinstance(found, type) and not hasattr(found, "from_parts")
        if arguments and not is_plain and found is not None:
            raise RewardError(
                f"reward {name!r} takes no arguments: it is no class, or made of parts"
            )
        if not is_plain:
            return found
        signature = inspect.signature(found)
        try:
            signature.bind(**(arguments or {}))
        except TypeError as error:
            raise RewardError(
                f"reward {name!r}: {error}, expected in rewards.arguments: "
                f"{', '.join(signature.parameters) or 'nothing'}"
            ) from error
        return found(**(arguments or {}))

    found = _guarded(name, load)
    if found is None:
        raise RewardError(f"reward {name!r}: {where} has no attribute {attribute!r}")
    if not callable(found):
        raise RewardError(f"reward {name!r} is a {type(found).__name__}, expected a function")
    return FoundReward(name, found)


def load_reward(
    name: str, parts: RewardParts | None = None, *, arguments: Mapping[str, Any] | None = None
) -> Reward:
    """The reward of a name, see `find_reward`.

    Args:
        name: of the reward.
        parts: for a reward with `from_parts`.
        arguments: for a plain class.

    Raises:
        RewardError: it cannot be imported or made, is not there, or cannot be called.
    """
    return find_reward(name, arguments).make(parts)


def reward_label(name: str) -> str:
    """A reward's name without the folders of its file: "my_rewards.py:color"."""
    where, separator, attribute = name.rpartition(":")
    return f"{Path(where).name}:{attribute}" if separator else name


def _as_reward(name: str, found: Any) -> Reward:
    if isinstance(found, Reward):
        return found
    own_name = str(getattr(found, "name", name.rpartition(":")[2]))
    return FunctionReward(found, own_name, bool(getattr(found, "may_be_nan", False)))


def _guarded(name: str, make: Callable[[], Any]) -> Any:
    """What `make` returns; whatever it raises as an error that names the reward and the line."""
    try:
        return make()
    except RewardError:
        raise
    except (Exception, SystemExit) as error:
        where = BUILT_IN.get(name, name).rpartition(":")[0]
        at = frame_of(error, [_file_module(Path(where)) if _is_file(where) else where])
        raise RewardError(f"reward {name!r}: {type(error).__name__}: {error}{at}") from error


def _is_file(where: str) -> bool:
    return where.endswith(".py")


def _file_module(path: Path) -> str:
    # Not the bare stem: a file may be called like a package that is imported already.
    return f"lvrpo_reward:{path.resolve()}"


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    module_spec = importlib.util.spec_from_file_location(_file_module(path), path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # dataclasses and pickle look a class's module up by name.
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[module_spec.name]
        raise
    return module
