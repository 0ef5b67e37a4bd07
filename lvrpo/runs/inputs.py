"""What a run depends on outside its directory: data files, their pictures, the code of rewards.

`inputs.json` holds their SHA-256 as they were when the run began. A run that goes on is compared
with it, by content: a file may move, and a time stamp says nothing. All bytes are read, which is
cheap beside decoding the pictures.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lvrpo.data.jsonl import picture_files
from lvrpo.rewards.registry import reward_label
from lvrpo.runs.directory import RunDirectoryError
from lvrpo.runs.files import sha256, write_atomically
from lvrpo.trainer.config import TrainConfig

INPUTS = "inputs.json"
Inputs = dict[str, dict[str, Any]]


def find_inputs(config: TrainConfig, rewards: Iterable[str]) -> Inputs:
    """The inputs of a run as they are now.

    Args:
        config: of the run; its data files have been checked.
        rewards: names of the rewards in use; those that come with lvrpo are left out.

    Returns:
        By key of the configuration or name of the reward: "path", "lines" or "code" (SHA-256),
        and for data "examples", a count, and "pictures", the SHA-256 of each by name.
    """
    found: Inputs = {}
    for key in ("source", "eval_source", "validation_source"):
        path = getattr(config.data, key)
        if path not in ("", "scenes"):
            found[f"data.{key}"] = _data_file(Path(path))
    if config.rollout.curriculum and (code := _code_file(config.rollout.curriculum)) is not None:
        found["rollout.curriculum"] = {"path": str(code), "code": sha256(code)}
    for spec in rewards:
        code = _code_file(spec)
        if code is not None:
            found[f"reward {reward_label(spec)}"] = {"path": str(code), "code": sha256(code)}
    return found


def compare_inputs(then: Inputs, now: Inputs) -> dict[str, str]:
    """What differs, in words, by the keys of `find_inputs`; paths may."""
    differences = {}
    for key, new in sorted(now.items()):
        path = new["path"]
        if key not in then:
            differences[key] = f"{INPUTS} has no record of {path}"
            continue
        old = then[key]
        if old.get("code") != new.get("code"):
            differences[key] = f"the code in {path} is not what it was when the run began"
        elif old.get("lines") != new.get("lines"):
            differences[key] = (
                f"{path} is not what it was when the run began: {old['examples']} examples then, "
                f"{new['examples']} now"
            )
        elif old.get("pictures") != new.get("pictures"):
            names = old["pictures"].keys() | new["pictures"].keys()
            changed = sorted(n for n in names if old["pictures"].get(n) != new["pictures"].get(n))
            differences[key] = (
                f"{len(changed)} pictures that {path} names are not what they were when the run "
                f"began, {changed[0]} for one"
            )
    return differences


def fingerprint_of(inputs: Mapping[str, Any]) -> str:
    """A short hash of one entry's contents."""
    contents = {key: value for key, value in inputs.items() if key != "path"}
    return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]


def read_inputs(run_dir: Path) -> Inputs | None:
    """What `write_inputs` wrote; None when it did not.

    Raises:
        RunDirectoryError: the file is damaged.
    """
    path = run_dir / INPUTS
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else None
    except (ValueError, TypeError) as error:
        raise RunDirectoryError(
            f"{path} is damaged ({error}); delete it and go on by --accept-changes"
        ) from error


def write_inputs(run_dir: Path, inputs: Inputs) -> None:
    """Write inputs.json."""
    text = json.dumps(inputs, indent=1, sort_keys=True) + "\n"
    write_atomically(run_dir / INPUTS, text.encode())


def _data_file(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    rows = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
    names = sorted(set().union(*map(picture_files, rows)))
    return {
        "path": str(path),
        "lines": hashlib.sha256(content).hexdigest(),
        "examples": len(rows),
        "pictures": {name: sha256(path.parent / name) for name in names},
    }


def _code_file(spec: str) -> Path | None:
    """The file of "file.py:attribute" or "module:attribute"; None where there is none."""
    where = spec.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(where)
    found = importlib.util.find_spec(where) if where else None
    return Path(found.origin) if found and found.origin and os.path.exists(found.origin) else None
