"""Rows of tokens in the cache: made once, by one process, and either whole or not there."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
from jaxtyping import Int

from spd_hydra import atomic
from spd_hydra.data.packing import (
    Document,
    Layout,
    Tally,
    chosen,
    fingerprint,
    is_held_out,
    write_rows,
    writing,
)
from spd_hydra.model.obtain import cache_root
from spd_hydra.section import ConfigError

logger = logging.getLogger(__name__)

TRAIN, HELD_OUT = "train", "eval"
_FACTS = "facts.json"

_checked: set[tuple[int | str, ...]] = set()  # files of rows that this process has read whole


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """A directory of the cache that holds the rows of one text.

    Attributes:
        directory: holds `train.bin`, `eval.bin`, `facts.json`.
        facts: `rows` and `sha256` by part, `length`, `dtype`, `overlap` and of how many `held_out` documents.
    """

    directory: Path
    facts: dict[str, Any]

    @classmethod
    def open(cls, directory: Path, *, warns: bool = True) -> Self | None:
        """The rows in a directory; None where they are not, or not as they were written.

        Args:
            directory: of the cache.
            warns: of rows that are there and cannot be used.
        """
        try:
            store = cls(directory, json.loads((directory / _FACTS).read_text(encoding="utf-8")))
            if "sha256" not in store.facts:
                raise ValueError("an older version wrote them, without a digest")
            for part in (TRAIN, HELD_OUT):
                store.rows(part)
                _require_unchanged(directory / f"{part}.bin", store.content(part))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            if warns:
                logger.warning("The tokens in %s cannot be used and are made again: %s", directory, error)
            return None
        return store

    def content(self, part: str) -> str:
        """Digest of the rows of a part."""
        return str(self.facts["sha256"][part])

    def rows(self, part: str) -> Int[np.ndarray, "rows length"]:
        """The rows of a part, mapped into memory."""
        number, length = self.facts["rows"][part], self.facts["length"]
        path, dtype = self.directory / f"{part}.bin", np.dtype(self.facts["dtype"])
        if path.stat().st_size != number * length * dtype.itemsize:
            raise ValueError(f"{path.name} is not as long as it was")
        if not number:
            return np.zeros((0, length), dtype)
        return np.memmap(path, dtype, mode="r", shape=(number, length))

    def describe(self) -> str:
        """One line about what is there."""
        rows = self.facts["rows"]
        return (
            f"tokens: {rows[TRAIN]:,} rows of {self.facts['length']} to train on, {rows[HELD_OUT]:,} held "
            f"out, in {self.directory}"
        )

    def notes(self) -> list[str]:
        """What one has to know of these rows, a sentence each."""
        overlap, of = self.facts["overlap"], self.facts.get("held_out")  # which older versions did not write
        if not overlap:
            return []
        number = f"{overlap} of {of}" if of else f"{overlap}"
        return [
            f"data: {number} held-out documents are also among those to train on; they are left out of the "
            "evaluation"
        ]


def write_store(
    directory: Path,
    layout: Layout,
    documents: Callable[[], Iterable[Document]],
    held_out: Callable[[], Iterable[Document]] | None,
    held_out_fraction: float,
) -> TokenStore:
    """Write the rows of documents to train on and of held-out ones, which have no document in common.

    Args:
        directory: exists.
        layout: how documents become rows.
        documents: gives a new iteration over all documents.
        held_out: the same over held-out ones; None: they are the share `held_out_fraction` of `documents`.
        held_out_fraction: chosen by the documents' tokens, so that copies are not on both sides.

    Raises:
        ConfigError: a part has no row, or a token id is none of the target's.
    """
    overlap = n_held_out = 0
    if held_out is None:
        kept = chosen(documents(), lambda one: not is_held_out(one, held_out_fraction))
        others = chosen(documents(), lambda one: is_held_out(one, held_out_fraction))
    else:
        wanted = {fingerprint(one) for one in held_out() if len(one)}
        shared = wanted.intersection(fingerprint(one) for one in documents())
        kept = iter(documents())
        others = chosen(held_out(), lambda one: fingerprint(one) not in shared)
        overlap, n_held_out = len(shared), len(wanted)
    tallies, digests = {}, {}
    for part, own in ((TRAIN, kept), (HELD_OUT, others)):
        tallies[part], digests[part] = write_rows(directory / f"{part}.bin", own, layout)
    _require_rows(tallies, layout, overlap, has_own=held_out is not None)
    rows = {part: tally.rows for part, tally in tallies.items()}
    facts: dict[str, Any] = {
        "rows": rows,
        "length": layout.length,
        "dtype": layout.dtype.name,
        "overlap": overlap,
    }
    facts |= {"sha256": digests, "held_out": n_held_out}
    with writing(directory / _FACTS):
        atomic.replace(directory / _FACTS, json.dumps(facts, indent=1))
    return TokenStore(directory, facts)


def _require_unchanged(path: Path, sha256: str) -> None:
    """Read a file once per process, and again when it was replaced, to see that it is as it was written."""
    status = path.stat()
    identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, sha256)
    if identity in _checked:
        return
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
            raise ValueError(f"{path.name} is damaged (its digest does not match)")
    _checked.add(identity)


def _require_rows(tallies: dict[str, Tally], layout: Layout, overlap: int, *, has_own: bool) -> None:
    train, held_out = tallies[TRAIN], tallies[HELD_OUT]
    if not train.rows:
        others = 0 if has_own else held_out.documents
        raise ConfigError(layout.why_no_row(train, "left to train on", others))
    if not held_out.rows and overlap:
        raise ConfigError(
            f"data.eval_split or data.eval_name: not one held-out row is left without the {overlap} "
            "documents that are also trained on; name other data"
        )
    if not held_out.rows:
        raise ConfigError(layout.why_no_row(held_out, "held out", 0 if has_own else train.documents))


def rows_directory(cache_dir: str, digest: str) -> Path:
    """Where the rows lie that are named by a digest of everything that they depend on."""
    return cache_root(cache_dir) / "tokens" / digest


def open_or_make(directory: Path, make: Callable[[Path], TokenStore]) -> TokenStore:
    """The rows in a directory of the cache, made there if they are not, or not as they were written.

    Several processes may ask at once: one makes them, the others wait for it. Where files cannot be locked
    each makes its own, and the first to finish is the one that counts.

    Args:
        directory: named by everything that the rows depend on.
        make: writes them into the directory that it is given.

    Raises:
        ConfigError: the cache cannot be written.
    """
    if (store := TokenStore.open(directory, warns=False)) is not None:
        return store
    with writing(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
    with _locked(directory.with_name(f"{directory.name}.lock")):
        if (store := TokenStore.open(directory)) is not None:
            return store
        temporary = directory.with_name(f".{directory.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        with writing(temporary):
            temporary.mkdir()
        try:
            make(temporary)
            with writing(directory):
                if directory.exists():  # damaged, or another process was faster
                    directory.rename(temporary / "replaced")
                temporary.rename(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(directory / "replaced", ignore_errors=True)
        store = TokenStore.open(directory)
    if store is None:
        raise ConfigError(f"cache_dir: what was written to {directory} cannot be read back")
    return store


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait until nobody else is in this block; where the file system has no locks, do not wait."""
    with writing(path):
        file = path.open("a")
    with file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
