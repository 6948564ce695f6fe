"""The directory of one run: made once, written by one process at a time, every file whole.

config.yaml  environment.json  metrics.jsonl  status.json  summary.json
checkpoints/  restarts/  figures/  errors/  report.html  subcomponents.json
"""

import contextlib
import os
import re
import secrets
import socket
import weakref
from collections.abc import Callable, Mapping
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any, Self

import yaml

from spd_hydra import atomic, metrics_log
from spd_hydra.command_word import command_word
from spd_hydra.lock import FileLock, LockedError, TakenOverError, is_owner
from spd_hydra.metrics_log import to_json
from spd_hydra.redaction import redact, redact_text
from spd_hydra.run_files import (
    CONFIG,
    ENVIRONMENT,
    LOCK,
    METRICS,
    STATUS,
    SUBCOMPONENTS,
    SUMMARY,
    RunFiles,
    cannot,
    require_run,
)
from spd_hydra.run_files import RunDirectoryError as RunDirectoryError
from spd_hydra.section import ConfigError

_NAME_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
_DEEPEST_NAME = 4


class Status(Enum):
    """How far a run has come."""

    running = "running"
    stopped = "stopped"  # by a signal; goes on with `resume=`
    done = "done"
    failed = "failed"


class RunDirectory(RunFiles):
    """One run's directory. Made by `create`, `at` or `open`, which lock it for this process, or by `view`.

    A lock ends with `close`, with the `with` block, or with the process, however that ends. Where a later
    start of the same job has taken the directory over, every attempt to write raises RunDirectoryError.
    """

    def __init__(self, path: Path, lock: FileLock | None = None, token: str | None = None) -> None:
        super().__init__(path)
        self._lock = lock
        self._token = token if lock is None else lock.owner.token
        if lock is not None:
            _written_here.add(self)

    @classmethod
    def create(cls, root: Path, name: str) -> Self:
        """Make `<root>/<name>/<date>_<time>_<random>` and lock it.

        Raises:
            ConfigError: the name would lead out of the root.
            RunDirectoryError: nothing can be written there.
        """
        path = root.absolute()
        try:
            parent = _inside(root, name)
            path = parent / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(3)}"
            parent.mkdir(parents=True, exist_ok=True)
            path.mkdir()
        except OSError as error:
            raise cannot("make the run directory", path, error) from error
        return cls._locked(path)

    @classmethod
    def at(cls, path: Path) -> Self:
        """Take a directory that a sweep prepared for this run: made if missing, holding no run and no data.

        Raises:
            RunDirectoryError: it holds a run or other files, is taken, or cannot be written.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            _require_unused(path)
            directory = cls._locked(path)
        except OSError as error:
            raise cannot("use the run directory", path, error) from error
        try:
            _require_unused(path)  # another process may have held the lock, and finished, in between
        except BaseException:
            directory.close()
            raise
        return directory

    @classmethod
    def open(cls, path: Path) -> Self:
        """Lock the directory of a run that was begun, to resume or to analyse it.

        Raises:
            RunDirectoryError: there is no run in it, a folder of it is a link, another process writes to it,
                or it is read-only.
        """
        require_run(path)
        for folder in [path / name for name in ("checkpoints", "restarts", "figures", "wandb")]:
            if folder.is_symlink():
                raise RunDirectoryError(f"{folder} is a link, which may lead out of the run directory")
        return cls._locked(path)

    @classmethod
    def view(cls, path: Path) -> Self:
        """The directory of a run for reading only, whoever writes to it.

        Raises:
            RunDirectoryError: there is no run in it.
        """
        require_run(path)
        return cls(path)

    @classmethod
    def follow(cls, path: Path, token: str) -> Self:
        """The directory that rank 0 writes, for the other ranks of the run: what they write is dropped.

        Args:
            path: the directory.
            token: of rank 0's, as its `token`.
        """
        return cls(path, token=token)

    @classmethod
    def _locked(cls, path: Path) -> Self:
        try:
            lock = FileLock(path / LOCK)
        except LockedError as error:
            raise RunDirectoryError(
                f"{path} is being written by {error}. Two runs cannot share a directory: wait for that one, "
                "stop it, or start a new run"
            ) from None
        except OSError as error:
            raise cannot("write to the run directory", path, error) from error
        try:
            for leftover in path.glob(".*.tmp"):  # of a writer that was killed; nobody else holds the lock
                if not leftover.is_dir():
                    leftover.unlink()
            atomic.replace(path / ".probe", b"")
            (path / ".probe").unlink()
        except OSError as error:
            lock.release()
            raise cannot("write to the run directory", path, error) from error
        return cls(path, lock)

    def close(self) -> None:
        """Let another process write here."""
        if self._lock is not None:
            self._lock.release()
            self._lock = self._token = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def token(self) -> str:
        """Names the process that writes here."""
        assert self._token is not None, "a viewed directory has no writer of its own"
        return self._token

    @property
    def is_open(self) -> bool:
        """Whether this process holds the lock."""
        return self._lock is not None

    @property
    def follows(self) -> bool:
        """Whether another rank does the writing."""
        return self._lock is None and self._token is not None

    def require_ownership(self) -> None:
        """Return if this process may still write here: to be asked just before something gets its name.

        Raises:
            RunDirectoryError: another process, such as a later start of the same job, has taken over.
        """
        assert self._lock is not None, "a viewed or closed run directory is not written to"
        try:
            self._lock.require_ours()
        except TakenOverError as error:
            raise RunDirectoryError(
                f"{self.path} was taken over by {error}. This process ends and writes nothing more"
            ) from None

    def write_config(self, text: str) -> None:
        """Save the resolved configuration; the text stays as it is unless it holds secrets."""
        plain = yaml.safe_load(text)
        shown = redact(plain)
        if shown != plain:
            text = yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)
        self._replace(CONFIG, text)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Save what `describe_environment` found."""
        self._replace(ENVIRONMENT, to_json(redact(environment), indent=2))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Save the result of the run."""
        self._replace(SUMMARY, to_json(summary, indent=2))

    def write_subcomponents(self, text: Mapping[str, Any] | None) -> None:
        """Save what the subcomponents of a model of text respond to; None: remove what was said before."""
        if text is not None:
            self._replace(SUBCOMPONENTS, to_json(text))
        elif not self.follows:
            with self.writing(SUBCOMPONENTS) as path:
                path.unlink(missing_ok=True)

    def write_status(
        self, status: Status, step: int, error: str | None = None, traceback: str | None = None
    ) -> None:
        """Say how far the run is. The time of the first start survives resumes."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        before = self.read_status() or {}
        content = {
            "status": status.value,
            "step": step,
            "error": None if error is None else redact_text(error),
            "traceback": None if traceback is None else redact_text(traceback),
            "started": before.get("started", now),
            "updated": now,
            "finished": now if status in {Status.done, Status.failed} else None,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        self._replace(STATUS, to_json(content, indent=2))

    def write_rank_error(self, rank: int, text: str) -> Path | None:
        """Keep the trace of an error on a rank, from that rank; None where it could not be kept."""
        if self._token is None or not is_owner(self.path / LOCK, self._token):
            return None
        path = self.path / "errors" / f"rank_{rank}.txt"
        try:
            path.parent.mkdir(exist_ok=True)
            atomic.replace(path, redact_text(text))
        except OSError:
            return None
        return path

    def writing(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """The path of a file of the run that the `with` block writes.

        Raises:
            RunDirectoryError: in place of an OSError in the block, or another process has taken over.
        """
        self.require_ownership()
        return self.errors("write", name)

    def append_metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Add a row to the metrics, given to the operating system at once; NaN and infinity become null."""
        self._write_metrics(metrics_log.append_row, step, split, values)

    def replace_metrics(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """Put a row in place of that of the same step and split, or among those of its step."""
        self._write_metrics(metrics_log.replace_row, step, split, values)

    def _write_metrics(
        self,
        write: Callable[[Path, Mapping[str, Any]], None],
        step: int,
        split: str,
        values: Mapping[str, float],
    ) -> None:
        if self.follows:
            return
        self.require_ownership()
        assert not {"step", "split"} & values.keys(), "a metric may not be called step or split"
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in values.items()}
        with self.errors("write", METRICS) as path:
            write(path, {"step": step, "split": split, **numbers})

    def sync_metrics(self) -> None:
        """Return when the metrics are on the disk: before a checkpoint, which must not be ahead of them."""
        if self.follows:
            return
        self.require_ownership()
        with self.errors("write", METRICS) as path:
            metrics_log.sync(path)

    def truncate_metrics(self, step: int) -> int:
        """Drop the rows of later steps than this, and torn lines, when going on from a checkpoint.

        Returns:
            The number of rows that were dropped.
        """
        if self.follows:
            return 0
        self.require_ownership()
        with self.errors("write", METRICS) as path:
            return metrics_log.truncate(path, step)

    def _replace(self, name: str, data: bytes | str) -> None:
        if self.follows:
            return
        self.require_ownership()
        with self.errors("write", name) as path:
            atomic.replace(path, data)


def written_here() -> list[RunDirectory]:
    """The run directories that this process has open for writing."""
    return [directory for directory in _written_here if directory.is_open]


_written_here: "weakref.WeakSet[RunDirectory]" = weakref.WeakSet()


def _inside(root: Path, name: str) -> Path:
    parts = name.split("/")
    if len(parts) > _DEEPEST_NAME or not all(_NAME_PART.fullmatch(part) for part in parts):
        raise ConfigError(
            f"name: got {name!r}, must be letters, digits and _ . + - beginning with a letter or digit, "
            f"with at most {_DEEPEST_NAME - 1} separating /"
        )
    path = root.absolute()
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise ConfigError(f"name: got {name!r}, but {path} is a link, which may lead out of the out_dir")
    return path


def _require_unused(path: Path) -> None:
    # Hydra and SLURM put their own logs and hidden folders there before the run begins.
    for entry in sorted(path.iterdir()):
        if not entry.name.startswith(".") and entry.suffix not in {".log", ".out", ".err"}:
            raise RunDirectoryError(
                f"{path} already holds {entry.name}: a new run needs a directory of its own. "
                f"To go on with a run use {command_word('resume', path)}"
            )
