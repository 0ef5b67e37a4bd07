"""The errors that a user can mend: the commands turn them into one line."""

from __future__ import annotations

from lvrpo.data.jsonl import DataError
from lvrpo.models.protocol import DivergedError
from lvrpo.rewards.reward import RewardError
from lvrpo.runs.checkpoint import CheckpointError
from lvrpo.runs.directory import RunDirectoryError
from lvrpo.trainer.config import ConfigError
from lvrpo.trainer.loop import SelfTestError
from lvrpo.trainer.update import ScheduleMismatch

USER_ERRORS: tuple[type[Exception], ...] = (
    CheckpointError,
    ConfigError,
    DataError,
    DivergedError,
    RewardError,
    RunDirectoryError,
    ScheduleMismatch,
    SelfTestError,
    # Every op, preset and file reader refuses a wrong value with a ValueError that names it.
    ValueError,
    OSError,
)
