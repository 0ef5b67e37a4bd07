"""The configuration of a run as TOML and `section.key=value`, and errors that say where to look.

An error names the file and line of the key where a file has it, what was given and what was
expected: "mine.toml:12: loss.preset is 'gpro', expected one of grpo, ...; did you mean grpo?".
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError

from lvrpo.trainer.config import ConfigError, TrainConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SECTIONS: dict[str, type] = get_type_hints(TrainConfig)


def load_config(path: Path | None = None, overrides: Iterable[str] = ()) -> TrainConfig:
    """Defaults, then the TOML file, then `section.key=value` overrides (values in TOML syntax).

    Raises:
        ConfigError: the file cannot be read, or a key is unknown or has a value it may not have.
    """
    return read_settings(path, overrides).over(TrainConfig())


@dataclass(frozen=True)
class Settings:
    """The keys that a file and a command line name, and where.

    Attributes:
        table: section to key to value, as TOML gives them, with files made absolute.
        file: where they are from; None without a file.
        text: of that file.
        overridden: `section.key` of those that the command line names.
    """

    table: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None
    text: str = ""
    overridden: frozenset[str] = frozenset()

    def over(self, base: TrainConfig) -> TrainConfig:
        """`base` with these keys in place of its own.

        Raises:
            ConfigError: a key is unknown or has a value that it may not have.
        """
        with self.located():
            return from_table(_overlay(to_table(base), self.table))

    @contextlib.contextmanager
    def located(self) -> Iterator[None]:
        """Put the file and line before a `ConfigError` that begins with a key of the file."""
        try:
            yield
        except ConfigError as error:
            key = _key_of(str(error))
            line = None if key in self.overridden else line_of(self.text, key)
            if self.file is None or line is None:
                raise
            raise ConfigError(f"{self.file}:{line}: {error}") from error


def read_settings(path: Path | None = None, overrides: Iterable[str] = ()) -> Settings:
    """The keys that a TOML file and overrides name, unchecked; see `load_config`.

    Files are named relative to the TOML file, in overrides relative to the working directory.

    Raises:
        ConfigError: the file cannot be read or is not TOML, or an override is no assignment.
    """
    table: dict[str, Any] = {}
    text = ""
    if path is not None:
        try:
            text = path.read_text(encoding="utf-8")
            table = tomllib.loads(text)
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML: {error}") from error
        _make_absolute(table, path.parent)
    named: dict[str, dict[str, Any]] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        section, _, name = key.strip().partition(".")
        if not (equals and section and name):
            raise ConfigError(f"{override!r} is not of the form section.key=value")
        parsed = _parse_value(value.strip())
        _refuse_entry(section, name, parsed)
        named.setdefault(section, {})[name] = parsed
    _make_absolute(named, Path())
    overridden = frozenset(f"{section}.{name}" for section in named for name in named[section])
    return Settings(_overlay(table, named), path, text, overridden)


def _refuse_entry(section: str, name: str, value: Any) -> None:
    """Say how an entry of a table is given."""
    key, _, entry = name.partition(".")
    if entry and section in SECTIONS and _properties(section).get(key, {}).get("type") == "object":
        raise ConfigError(
            f"{section}.{name} is an entry of {section}.{key}, {expected(f'{section}.{key}')}, "
            f"expected the whole table: --set '{section}.{key}={{ {entry} = {json.dumps(value)} }}'"
        )


def from_table(table: Mapping[str, Any]) -> TrainConfig:
    """The configuration of nested tables.

    Raises:
        ConfigError: a key is unknown or has a value that it may not have.
    """
    built = {}
    for name, values in table.items():
        if name not in SECTIONS:
            raise ConfigError(
                f"unknown section [{name}]; there are {', '.join(SECTIONS)}{_meant(name, SECTIONS)}"
            )
        if not isinstance(values, Mapping):
            raise ConfigError(f"{name} is {values!r}, expected a section [{name}]")
        try:
            built[name] = SECTIONS[name](**values)
        except ValidationError as error:
            raise ConfigError(_in_words(error, name)) from error
    try:
        return TrainConfig(**built)
    except ValidationError as error:
        raise ConfigError(_in_words(error)) from error


def to_table(config: TrainConfig) -> dict[str, Any]:
    """Nested tables, the inverse of `from_table`."""
    return dataclasses.asdict(config)


def to_toml(config: TrainConfig) -> str:
    """The resolved configuration as a TOML file."""
    return tomli_w.dumps(to_table(config))


def line_of(text: str, key: str) -> int | None:
    """The line of a TOML text, counted from 1, that gives `key`, of one or more parts, its value.

    It is found by the parser alone: the key is given where a part of the text first has it.
    """
    lines = text.splitlines()
    start = 1  # of what the next part adds
    for end in range(1, len(lines) + 1):
        try:
            found: Any = tomllib.loads("\n".join(lines[:end]))
        except tomllib.TOMLDecodeError:  # inside a value of several lines
            continue
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        if found is not None:
            return start
        start = end + 1
    return None


def expected(key: str) -> str:
    """What a key may be, in words: "an integer in [1, 9]", "one of grpo, dapo".

    Args:
        key: `section.key`, or `section.key.name` for the entries of a table or list.
    """
    return _expected(_schema(key))


def _expected(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return "one of " + ", ".join(choice or '""' for choice in schema["enum"])
    if schema["type"] == "object" and schema["additionalProperties"] is True:
        return "a table"
    if schema["type"] == "object":
        keys = " or ".join(schema.get("propertyNames", {}).get("enum", ())) or "names"
        return f"a table of {keys}, each with {_expected(schema['additionalProperties'])}"
    if schema["type"] == "array":
        return f"a list, each {_expected(schema['items'])}"
    names = {"integer": "an integer", "number": "a number", "boolean": "true or false"}
    words = names.get(schema["type"], "a string")
    bounds = [
        schema.get(f"{side}imum", schema.get(f"exclusive{side.title()}imum"))
        for side in ("min", "max")
    ]
    if bounds == [None, None]:
        return words
    opening = "(" if "exclusiveMinimum" in schema else "["
    closing = ")" if "exclusiveMaximum" in schema else "]"
    low, high = map(_number, bounds)
    return f"{words} in {opening}{low}, {high}{closing}"


def _number(value: float) -> str:
    short = f"{value:g}".replace("e+0", "e").replace("e+", "e")
    return short if float(short) == value else str(value)


def _schema(key: str) -> dict[str, Any]:
    """The JSON schema of the values of a key, see `expected`."""
    section, name, *entry = key.split(".", 2)
    schema: dict[str, Any] = _properties(section)[name]
    if not entry:
        return schema
    entries: dict[str, Any] = schema.get("items") or schema["additionalProperties"]
    return entries


@functools.cache
def _properties(section: str) -> dict[str, Any]:
    properties: dict[str, Any] = TypeAdapter(SECTIONS[section]).json_schema()["properties"]
    return properties


def _in_words(error: ValidationError, section: str = "") -> str:
    """The first thing that pydantic found, as one line that begins with the key."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "value_error":  # by a validator of ours
        return str(first["ctx"]["error"])
    key, value = ".".join([section, *map(str, first["loc"])]), first["input"]
    known = _properties(section)
    if first["loc"][0] not in known:
        close = _meant(str(first["loc"][0]), known, section)
        return f"unknown key {key}; [{section}] has {', '.join(known)}{close}"
    if first["loc"][-1] == "[key]":  # of a table
        key = f"{section}.{first['loc'][0]}"
        return f"{key} has {value!r}, expected {expected(key)}"
    close = _meant(value, _schema(key).get("enum", ())) if isinstance(value, str) else ""
    return f"{key} is {value!r}, expected {expected(key)}{close}"


def _meant(word: str, words: Iterable[str], section: str = "") -> str:
    close = difflib.get_close_matches(word, [each for each in words if each])
    if not close:
        return ""
    # Two letters that changed places are the likelier slip.
    best = min(close, key=lambda each: sorted(each) != sorted(word))
    return f"; did you mean {section}.{best}?" if section else f"; did you mean {best}?"


def _key_of(message: str) -> str:
    """The key that an error begins with: "runs" for "unknown section [runs]"."""
    found = re.match(r"(?:\[\w+\] |unknown \w+ )?\[?([\w.]+)", message)
    return found[1] if found else ""


def _overlay(table: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """`table` with the keys of `named` in place of its own."""
    result = dict(table)
    for section, values in named.items():
        ours = table.get(section, {})
        if isinstance(ours, Mapping):  # what is no section is refused by `from_table`
            result[section] = {**ours, **values} if isinstance(values, Mapping) else values
    return result


def _make_absolute(table: dict[str, Any], folder: Path) -> None:
    def absolute(name: Any) -> Any:
        return os.path.abspath(folder / name) if isinstance(name, str) else name

    names = ("data", "rewards", "rollout", "model")
    data, rewards, rollout, model = (table.get(name) for name in names)
    if isinstance(rollout, dict) and ".py:" in str(rollout.get("curriculum", "")):
        rollout["curriculum"] = absolute(rollout["curriculum"])
    if isinstance(model, dict) and model.get("path", ""):
        model["path"] = absolute(model["path"])
    for key in ("source", "eval_source", "validation_source"):
        if isinstance(data, dict) and data.get(key, "") not in ("", "scenes"):
            data[key] = absolute(data[key])
    for key in ("understand", "generate", "arguments"):
        if isinstance(rewards, dict) and isinstance(rewards.get(key), dict):
            rewards[key] = {
                absolute(name) if ".py:" in name else name: value
                for name, value in rewards[key].items()
            }
    if isinstance(rewards, dict) and isinstance(rewards.get("right"), dict):
        rewards["right"] = {
            skill: absolute(name) if ".py:" in str(name) else name
            for skill, name in rewards["right"].items()
        }


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # a bare word is a string
