"""What lies in the directory of a run, for reading, whoever writes to it."""

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from spd_hydra import metrics_log
from spd_hydra.lock import FileLock

logger = logging.getLogger(__name__)

CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"
STATUS, SUMMARY, LOCK = "status.json", "summary.json", ".lock"
SUBCOMPONENTS = "subcomponents.json"


class RunDirectoryError(RuntimeError):
    """A run directory cannot be used: it is taken, read-only, gone, or holds something else."""


class RunFiles:
    """The files of one run.

    Args:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints lie."""
        return self.path / "checkpoints"

    @property
    def figures(self) -> Path:
        """Where the pictures lie."""
        return self.path / "figures"

    def read_status(self) -> dict[str, Any] | None:
        """What `write_status` last wrote; a killed run still says `running`, see `is_being_written`."""
        return self._read_json(STATUS)

    def read_summary(self) -> dict[str, Any] | None:
        """What was last written by `write_summary`."""
        return self._read_json(SUMMARY)

    def read_subcomponents(self) -> dict[str, Any] | None:
        """What was last written by `write_subcomponents`."""
        return self._read_json(SUBCOMPONENTS)

    def read_environment(self) -> dict[str, Any]:
        """What `write_environment` saved; empty if nothing was."""
        return self._read_json(ENVIRONMENT) or {}

    def read_config(self) -> str:
        """The text of the saved configuration."""
        with self.errors("read", CONFIG) as path:
            return path.read_text()

    def is_being_written(self) -> bool | None:
        """Whether a process holds the lock of this directory; None: it cannot be told, see `FileLock`."""
        return FileLock.is_held(self.path / LOCK)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of the metrics in the order in which they were written; torn lines are passed over."""
        with self.errors("read", METRICS) as path:
            return [row for _, row in metrics_log.read_rows(path)]

    @contextlib.contextmanager
    def errors(self, what: str, name: str) -> Iterator[Path]:
        """The path of a file of the run, in whose place an OSError in the block says what cannot be done."""
        try:
            yield self.path / name
        except OSError as error:
            raise cannot(what, self.path / name, error) from error

    def _read_json(self, name: str) -> dict[str, Any] | None:
        with self.errors("read", name) as path:
            if not path.exists():
                return None
            try:
                found, why = json.loads(path.read_text()), "it holds no mapping"
            except ValueError as error:
                found, why = None, str(error)
        if isinstance(found, dict):
            return found
        # None of them is needed to go on, and all are written anew.
        logger.warning("%s is damaged and counts as missing: %s", path, why)
        return None


def require_run(path: Path) -> None:
    """Refuse a directory that holds no run.

    Raises:
        RunDirectoryError: says why.
    """
    if not (path / CONFIG).is_file():
        if is_beginning(path):
            raise RunDirectoryError(f"{path}: {BEGINNING}")
        reason = f"it has no {CONFIG}" if path.is_dir() else "there is no such directory"
        raise RunDirectoryError(f"{path} is not the directory of a run: {reason}")


def is_beginning(path: Path) -> bool:
    """Whether a process has just made this directory for a run, and has yet to write its configuration."""
    return (path / LOCK).exists() and not (path / CONFIG).exists() and FileLock.is_held(path / LOCK) is True


BEGINNING = f"its run is just beginning and has written no {CONFIG} yet; look again in a few seconds"


def cannot(what: str, path: Path, error: OSError) -> RunDirectoryError:
    """What a user is told of an error of the file system."""
    return RunDirectoryError(
        f"cannot {what} {path}: {error.strerror or error}. Check that it exists, is writable and has room, "
        "or choose another place with out_dir="
    )
