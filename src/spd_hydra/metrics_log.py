"""The metrics of a run: one JSON object per line, appended as they come."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spd_hydra import atomic

_TAIL_BYTES = 1 << 16


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add a row and hand it to the operating system; after a torn line it begins on a line of its own."""
    line = to_json(row).encode() + b"\n"
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o666), "ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end and os.pread(file.fileno(), 1, end - 1) != b"\n":
            line = b"\n" + line
        file.write(line)


def read_rows(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Every whole line with the row it holds, in the order of writing; torn lines are passed over."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append((line, row))
    return rows


def last_row(path: Path) -> dict[str, Any] | None:
    """The newest whole row, found without reading the whole file."""
    try:
        with path.open("rb") as file:
            size, tail = file.seek(0, os.SEEK_END), _TAIL_BYTES
            while True:  # a row of a model with many sites may be longer
                file.seek(max(0, size - tail))
                row = _last_of(file.read().split(b"\n"))
                if row is not None or tail >= size:
                    return row
                tail *= 8
    except FileNotFoundError:
        return None


def _last_of(lines: list[bytes]) -> dict[str, Any] | None:
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                return row
    return None


def truncate(path: Path, step: int) -> int:
    """Drop the rows of later steps than this, and torn lines; returns how many rows were dropped.

    The rows that stay keep their bytes.
    """
    if not path.exists():
        return 0
    rows = read_rows(path)
    kept = [line for line, row in rows if row["step"] <= step]
    atomic.replace(path, b"".join(line + b"\n" for line in kept))
    return len(rows) - len(kept)


def replace_row(path: Path, row: Mapping[str, Any]) -> None:
    """Put a row in place of that of the same step and split, else behind the last row of no later step.

    The other rows keep their bytes; torn lines are dropped.
    """
    rows = read_rows(path)
    line = to_json(row).encode()
    same = [n for n, (_, old) in enumerate(rows) if _place(old) == _place(row)]
    before = same[-1] if same else sum(old["step"] <= row["step"] for _, old in rows)
    kept = [(n, old) for n, (old, _) in enumerate(rows) if n not in same]
    lines = [old for n, old in kept if n < before] + [line] + [old for n, old in kept if n >= before]
    atomic.replace(path, b"".join(each + b"\n" for each in lines))


def _place(row: Mapping[str, Any]) -> tuple[Any, Any]:
    return row["step"], row.get("split")


def sync(path: Path) -> None:
    """Return when the rows are on the disk."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        os.fsync(file.fileno())


def to_json(content: Mapping[str, Any], indent: int | None = None) -> str:
    """JSON that every reader takes: NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(content), indent=indent, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value
