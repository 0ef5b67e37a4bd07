"""Prompts of both kinds: the embedded digit scenes, and a user's own JSONL files."""

from lvrpo.info import require

require("numpy")

from lvrpo.data.digits import SPLITS, Split
from lvrpo.data.example import (
    Cell,
    Example,
    LayoutRule,
    RelationRule,
    Rule,
    SumRule,
    Task,
    check_disjoint,
    rule_from_json,
    rule_to_json,
)
from lvrpo.data.jsonl import DataError, JsonlExamples
from lvrpo.data.phrases import scene_words
from lvrpo.data.scenes import SceneConfig, scene_examples, with_label_noise

__all__ = [
    "SPLITS",
    "Cell",
    "DataError",
    "Example",
    "JsonlExamples",
    "LayoutRule",
    "RelationRule",
    "Rule",
    "SceneConfig",
    "Split",
    "SumRule",
    "Task",
    "check_disjoint",
    "rule_from_json",
    "rule_to_json",
    "scene_examples",
    "scene_words",
    "with_label_noise",
]
