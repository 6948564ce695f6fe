"""The runs of `recovery.py`, read from their directories."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_hydra.report.sweep import SweepRow, sweep_rows
from spd_hydra.run_dir import RunDirectory, RunDirectoryError


@dataclasses.dataclass(frozen=True)
class Run:
    """One cell of the plan and what came of it.

    Attributes:
        experiment: name of the preset.
        seed: of the run.
        row: state, verdict and numbers, as the table of a sweep has them.
        summary: content of summary.json; empty unless the run is done.
        environment: content of environment.json.
        started: date of the start, empty for a run that never began.
        attempts: earlier attempts at the same run that were stopped or failed.
    """

    experiment: str
    seed: int
    row: SweepRow
    summary: Mapping[str, Any]
    environment: Mapping[str, Any]
    started: str
    attempts: int

    @property
    def failed(self) -> bool:
        """Whether it ended with an error."""
        return self.row.state == "failed"

    @property
    def ended(self) -> bool:
        """Whether it counts as a trial: a failed run is one that did not find the answer."""
        return self.row.state in {"done", "failed"}

    @property
    def result(self) -> str:
        """The verdict, or why there is none."""
        if self.row.state != "done":
            return f"**{self.row.state}**" + (f": {self.row.error}" if self.row.error else "")
        return "solved" if self.row.solved else "**not solved**"

    def value(self, key: str) -> float | None:
        """A number of the summary, None if it is missing."""
        return self.row.numbers.get(key)


def read_runs(out: Path, plan: Mapping[str, Sequence[int]]) -> list[Run]:
    """Every planned run in the order of the plan; nothing that was planned is left out.

    Args:
        out: holds `<experiment>/<seed>/`, each a run directory.
        plan: seeds by experiment.
    """
    runs: list[Run] = []
    for experiment, seeds in plan.items():
        folder = out / experiment
        folder.mkdir(parents=True, exist_ok=True)
        rows = {row.job: row for row in sweep_rows(folder, {seed: [f"seed={seed}"] for seed in seeds})}
        runs += [_read_run(folder, experiment, seed, rows[seed]) for seed in seeds]
    return runs


def found(out: Path) -> dict[str, list[int]]:
    """Seeds by experiment of the finished runs that lie in a folder, whoever started them."""
    seeds: dict[str, list[int]] = {}
    for summary in sorted(out.rglob("summary.json")):
        seed, experiment = summary.parent.name, summary.parent.parent.relative_to(out).as_posix()
        if seed.isdecimal():
            seeds.setdefault(experiment, []).append(int(seed))
    return {experiment: sorted(own) for experiment, own in seeds.items()}


def _read_run(folder: Path, experiment: str, seed: int, row: SweepRow) -> Run:
    path = folder / str(seed)
    attempts = len(list(folder.glob(f"{seed}.attempt_*")))
    try:
        directory = RunDirectory.view(path)
        environment, status = directory.read_environment(), directory.read_status() or {}
        summary = (directory.read_summary() or {}) if row.state == "done" else {}
    except RunDirectoryError:
        return Run(experiment, seed, row, {}, {}, "", attempts)
    if row.state == "running" and directory.is_being_written() is False:
        row = dataclasses.replace(row, state="stopped")
    return Run(experiment, seed, row, summary, environment, str(status.get("started", "")), attempts)
