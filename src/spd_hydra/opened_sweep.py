"""A sweep's directory, opened from Python: its runs as rows of a table, and each of them as a run."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spd_hydra.counted import counted
from spd_hydra.launcher import watch
from spd_hydra.opened_run import Run
from spd_hydra.report.sweep import SweepRow, varying_keys, with_replicas
from spd_hydra.run_files import CONFIG
from spd_hydra.saved_config import load_config

log = logging.getLogger(__name__)

_FIRST = ("folder", "state", "experiment", "seed")
_VERDICT = ("solved", "strict", "certified")
_LAST = ("finding", "error")


@dataclasses.dataclass(frozen=True, repr=False)
class Sweep:
    """A sweep, opened for reading; its jobs may still be going on. What it says is read anew every time.

    Attributes:
        path: the directory.
        trust_remote_code: whether the targets' own Python code may be run.
    """

    path: Path
    trust_remote_code: bool = False

    def __repr__(self) -> str:
        rows = self._read()
        return f"Sweep({counted(len(rows), 'run')}: {_by_state(rows)}, {str(self.path)!r})"

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A dictionary per run, as `pandas.DataFrame` takes them, with the same keys in each.

        `folder` (below `path`, and the key in `runs`), `state` (done, running, stopped, failed, pending,
        requeued, missing), `experiment`, `seed`; the settings in which jobs differ, by full key; `solved`,
        `strict`, `certified`; the numbers of `sweep.csv`, such as `mmcs` and `l0`, of done runs; `finding`
        and `error`. None where a run has no such thing.
        """
        rows = self._read()
        settings = [key for key in varying_keys(rows) if key != "experiment"]
        numbers = dict.fromkeys(name for row in rows for name in row.numbers)
        return [
            {name: getattr(row, name) for name in _FIRST}
            | {key: plain_value(row.overrides.get(key)) for key in settings}
            | {name: getattr(row, name) for name in _VERDICT}
            | {name: row.numbers.get(name) for name in numbers}
            | {name: getattr(row, name) for name in _LAST}
            for row in rows
        ]

    @property
    def runs(self) -> dict[str, Run]:
        """The runs that have begun, opened, by `folder`, in the order of the rows."""
        folders = [row.folder for row in self._read() if (self.path / row.folder / CONFIG).is_file()]
        return {
            folder: Run(
                self.path / folder,
                load_config(self.path / folder / CONFIG, keeps_unknown_terms=True),
                self.trust_remote_code,
            )
            for folder in folders
        }

    def say_what_is_not_done(self) -> None:
        """Warn of runs that failed, have not ended or left nothing, with the reasons."""
        left = [row for row in self._read() if row.state != "done"]
        if left:
            told = [f"{row.folder} {row.state}" + (f" ({row.error})" if row.error else "") for row in left]
            log.warning("%s of %s not done: %s", counted(len(left), "run"), self.path, "; ".join(told))

    def _read(self) -> list[SweepRow]:
        return with_replicas(self.path, watch.stand(self.path).rows)


def plain_value(text: str | None) -> Any:
    """What an override says, as a whole number, a number, true or false, or the text itself."""
    if text is None or text == "null":
        return None
    if text in {"true", "false"}:
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _by_state(rows: Sequence[SweepRow]) -> str:
    states = [row.state for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
