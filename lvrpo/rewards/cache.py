"""Scores that are kept: what was scored once is not scored again, in this process or another."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lvrpo.rewards._calls import finished
from lvrpo.rewards.reward import Reward, RewardError, Samples

#: Keys in one statement; SQLite takes 999 everywhere.
_KEYS = 900


@dataclass(frozen=True, eq=False)
class CachedReward:
    """A reward that is asked once for each content: prompt, answers, columns, and what was sampled.

    For rewards that score each sample by itself, always alike; one that compares the samples of a
    batch must not be cached. The file is an SQLite data base, which any number of processes of one
    machine may share; a network file system may not know the locks that it needs.

    Args:
        reward: that is asked for what is new.
        path: of the file; empty keeps the scores in memory, in this process alone.
        version: of the reward: another one knows nothing of the scores of this one.
        most: scores that are kept; those that were used longest ago go first.
    """

    reward: Reward
    path: str = ""
    version: str = ""
    most: int = 100_000
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _memory: list[sqlite3.Connection] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"CachedReward: most is {self.most}, expected a number >= 1")

    @property
    def name(self) -> str:
        """Of the reward."""
        return self.reward.name

    @property
    def may_be_nan(self) -> bool:
        """As the reward."""
        return self.reward.may_be_nan

    @property
    def __wrapped__(self) -> Reward:
        return self.reward

    def __call__(self, samples: Samples) -> Tensor:
        """[B] fp32, NaN where the reward has no score.

        Raises:
            RewardError: the reward returned another number of scores than samples.
        """
        keys = [self._key(samples, row) for row in range(len(samples))]
        with self._connection() as connection:
            known = _find(connection, keys)
        # Of equal samples the first alone is asked for.
        new = {key: row for row, key in reversed(list(enumerate(keys))) if key not in known}
        rows = sorted(new.values())
        if rows:
            found = [*finished(self.reward(samples.take(rows)))]
            if len(found) != len(rows):
                raise RewardError(
                    f"reward {self.name!r} returned {len(found)} scores for {len(rows)} samples"
                )
            scores = [math.nan if value is None else float(value) for value in found]
            known |= {keys[row]: score for row, score in zip(rows, scores, strict=True)}
        with self._connection() as connection:
            used = time.time()
            connection.executemany(
                "INSERT OR REPLACE INTO scores VALUES (?, ?, ?)",
                [(key, known[key], used) for key in set(keys) if not math.isinf(known[key])],
            )
            connection.execute(
                "DELETE FROM scores WHERE key IN (SELECT key FROM scores ORDER BY used DESC "
                "LIMIT -1 OFFSET ?)",
                (self.most,),
            )
        return torch.tensor([known[key] for key in keys])

    def _key(self, samples: Samples, row: int) -> bytes:
        example = samples.examples[row]
        about: list[Any] = [self.name, self.version, example.task, example.prompt, example.answers]
        about += [example.rule and example.rule.key, example.extra]
        about += [samples.texts[row], samples.finish_reasons[row]]
        digest = hashlib.blake2b(digest_size=20)
        shown = [*example.further_images, *(frames for frames, _ in example.videos)]
        about += [len(shown), [fps for _, fps in example.videos]]
        digest.update(json.dumps(about, sort_keys=True, default=str).encode())
        for picture in (example.image, example.target, *shown):
            _add_pixels(digest, None if picture is None else torch.from_numpy(picture))
        drawn = samples.texts[row] is None and samples.images is not None
        at = list(samples.image_index).index(row) if drawn else 0
        _add_pixels(digest, samples.images[at] if drawn and samples.images is not None else None)
        return digest.digest()

    @contextlib.contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        """A transaction; a file is opened anew for each, so that a fork or a thread may use it."""
        with self._lock:
            if self.path:
                connection = sqlite3.connect(self.path, timeout=60)
            elif self._memory:
                connection = self._memory[0]
            else:
                connection = sqlite3.connect(":memory:", check_same_thread=False)
                self._memory.append(connection)
            try:
                with connection:
                    connection.execute(
                        "CREATE TABLE IF NOT EXISTS scores "
                        "(key BLOB PRIMARY KEY, score REAL, used REAL) WITHOUT ROWID"
                    )
                    yield connection
            finally:
                if self.path:
                    connection.close()


def _add_pixels(digest: Any, picture: Tensor | None) -> None:
    if picture is None:
        digest.update(b"none")
        return
    pixels = picture.detach().float().cpu().contiguous()
    digest.update(str(tuple(pixels.shape)).encode())
    digest.update(pixels.numpy().tobytes())


def _find(connection: sqlite3.Connection, keys: Sequence[bytes]) -> dict[bytes, float]:
    known: dict[bytes, float] = {}
    unique = list(dict.fromkeys(keys))
    for start in range(0, len(unique), _KEYS):
        part = unique[start : start + _KEYS]
        marks = ",".join("?" * len(part))
        rows = connection.execute(f"SELECT key, score FROM scores WHERE key IN ({marks})", part)
        # NaN is stored as NULL.
        known |= {key: math.nan if score is None else score for key, score in rows}
    return known
