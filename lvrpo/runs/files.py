"""Files that survive anything: JSON lines appended in one piece, all else replaced in one piece.

A line counts when its newline is there. A kill leaves a part of the last line at most; a power
failure may leave NULs in its place, or a part that happens to end in a newline.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

Row = dict[str, Any]


def append_row(path: Path, row: Row) -> None:
    """Add one line in a single write, or nothing at all."""
    line = json.dumps(row, allow_nan=False).encode() + b"\n"
    with path.open("ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        if file.write(line) != len(line):
            file.truncate(end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def flush_to_disk(path: Path) -> None:
    """Wait until what was appended would survive a power failure."""
    if path.exists():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def why_not_written(path: Path, error: OSError | SafetensorError) -> str:
    """What to say of it, the path first."""
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    number = error.errno if isinstance(error, OSError) else None
    code = re.search(r"\(os error (\d+)\)", reason)  # all that safetensors says of it
    if (int(code[1]) if code else number) in (errno.ENOSPC, errno.EDQUOT):
        reason = "no space left on the disk"
    return f"{path}: {reason}"


def read_rows(path: Path) -> list[tuple[bytes, Row]]:
    """(line, row) pairs; null is read as NaN. A damaged last line is left out.

    Raises:
        ValueError: a line before the last is not a JSON object with an int step.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    pairs = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}: not a JSON object with an int step")
        pairs.append((line, {k: math.nan if v is None else v for k, v in row.items()}))
    return pairs


def keep_rows(path: Path, keep: Callable[[Row], bool]) -> int:
    """Leave the rows for which `keep` holds, byte for byte, and no damaged last line.

    Returns:
        How many bytes of a damaged last line were dropped.
    """
    if not path.exists():
        return 0
    pairs, size = read_rows(path), path.stat().st_size
    kept = b"".join(line + b"\n" for line, row in pairs if keep(row))
    if len(kept) != size:
        write_atomically(path, kept)
    return size - sum(len(line) + 1 for line, _ in pairs)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file so that at every moment the old or the new one is there, never a part."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)  # a failed write does not say where
        raise
    finally:
        partial.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
