"""How the jobs of a sweep stand: what their directories say, together with what the scheduler says."""

import contextlib
import dataclasses
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from spd_hydra import metrics_log, report
from spd_hydra.competition import steps_taken
from spd_hydra.going_on import going_on
from spd_hydra.launcher import slurm
from spd_hydra.launcher.record import SUBMITIT, SweepJob, SweepRecord, is_held, launcher_in, log_paths
from spd_hydra.launcher.slurm import SchedulerState
from spd_hydra.report.numbers import NOTHING, number, text_table
from spd_hydra.report.sweep import SweepRow
from spd_hydra.run_dir import RunDirectory, RunDirectoryError
from spd_hydra.run_files import METRICS
from spd_hydra.terminal import is_terminal, show

States = Mapping[int, SchedulerState] | None
"""What the scheduler says by job number; a job it has forgotten is missing. None: it does not answer."""

_ACTIVE = {"RUNNING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"}
_QUEUED = {
    "PENDING",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "REQUEUE_FED",
    "SPECIAL_EXIT",
    "RESV_DEL_HOLD",
}
OPEN = {"pending", "requeued", "running"}
"""States of jobs that have not ended."""

_LESS_TIME = "that is less than asked for; cancel, and ask for less with launcher.time="
_IN_VAIN = {
    "PartitionTimeLimit": _LESS_TIME,
    "QOSMaxWallDurationPerJobLimit": _LESS_TIME,
    "AssocMaxWallDurationPerJobLimit": _LESS_TIME,
    "PartitionNodeLimit": "the partition gives fewer nodes; cancel, and ask for fewer with launcher.nodes=",
    "BadConstraints": "no node has what is asked for: launcher.constraint, launcher.gpus, launcher.memory",
    "DependencyNeverSatisfied": "what it depends on has failed; cancel it",
    "JobHeldUser": "held; let it go with scontrol release <id>",
    "JobHeldAdmin": "held by the cluster's administrators; ask them",
}
"""What to do about reasons that no waiting will mend."""

_GIVE_WAY = {"pending": 1, "done": 2}
_AROUND_ROWS = 5  # lines of a table that are no jobs, and the cursor's
_LINE_SECONDS = 30.0  # between two lines where there is no terminal
_TRACE_LINES = 25


def look(sweep_dir: Path, record: SweepRecord, states: States) -> list[SweepRow]:
    """A row for every job, as it stands now.

    Args:
        sweep_dir: the directory of the sweep.
        record: what was submitted.
        states: what the scheduler says; None where there is none to ask.
    """
    jobs = {job.number: job for job in record.jobs}
    rows = report.sweep_rows(
        sweep_dir,
        {number: job.overrides for number, job in jobs.items()},
        {number: (job.experiment, job.seed) for number, job in jobs.items()},
    )
    # A sweeper that chooses as it goes has more jobs in this process than were planned.
    shown = [row for row in rows if row.job in jobs or record.launcher == "local"]
    found = []
    for row in shown:
        job = jobs.get(row.job)
        by_scheduler = record.launcher_of(job) == "slurm"
        # Others of the same sweep may run here.
        known = states if by_scheduler or (states is not None and row.job in states) else None
        found.append(_row(sweep_dir, record, row, job, known, by_scheduler=by_scheduler))
    return found


class Standing(NamedTuple):
    """How a sweep stands: a row for every job, and whether a process on this machine runs its jobs."""

    rows: list[SweepRow]
    is_running: bool


def stand(sweep_dir: Path) -> Standing:
    """How the jobs of a sweep stand now, whoever started them.

    Raises:
        ConfigError: there is no sweep, or its record cannot be read.
    """
    record = SweepRecord.read(sweep_dir)
    rows = look(sweep_dir, record, scheduler_states(record))
    is_running = is_held(sweep_dir)
    if is_running:  # by a process that will begin them
        rows = [dataclasses.replace(row, state="pending") if row.state == "missing" else row for row in rows]
    return Standing(rows, is_running)


def scheduler_states(record: SweepRecord) -> States:
    """What the scheduler says of the jobs of a sweep now."""
    submitted = [job for job in record.jobs if job.id is not None and record.launcher_of(job) == "slurm"]
    numbers = {job.id: job.number for job in submitted if job.id is not None}
    if not numbers:
        return None
    found = slurm.states(list(numbers))
    return None if found is None else {numbers[id]: state for id, state in found.items() if id in numbers}


def _row(
    sweep_dir: Path,
    record: SweepRecord,
    row: SweepRow,
    job: SweepJob | None,
    states: States,
    *,
    by_scheduler: bool,
) -> SweepRow:
    state = None if states is None else states.get(row.job)
    is_over = states is not None and (state is None or state.name not in _QUEUED | _ACTIVE)
    last = _last_row(sweep_dir / str(row.job))
    choice = None if last else steps_taken(sweep_dir / str(row.job))
    row = dataclasses.replace(row, step=last.get("step"), loss=last.get("loss/total"), choice_steps=choice)
    if job is not None:
        row = dataclasses.replace(row, id=job.id, steps=job.steps)
    before = job.said_before if job is not None and (by_scheduler or states is not None) else None
    is_analysis = "run" in row.overrides  # whose run was done before, and is linked once it is measured
    is_old = not is_analysis and _tells_of_before(sweep_dir / str(row.job), before)
    if is_old and not (is_over and row.state == "done"):
        row = dataclasses.replace(row, state="missing", error=None, traceback=None)
    if row.state == "done":
        return row
    if states is None:
        return _without_scheduler(sweep_dir, row, is_submitted=by_scheduler and row.id is not None)
    if state is None:
        state = SchedulerState(name="unknown to the scheduler")
        return _ended(sweep_dir, record, row, job, state)
    if state.name in _QUEUED:
        queued = "pending" if row.state == "missing" else "requeued"
        return dataclasses.replace(row, state=queued, error=None, waits_for=state.reason or None)
    if state.name in _ACTIVE:
        return row if row.state == "failed" else dataclasses.replace(row, state="running", error=None)
    return _ended(sweep_dir, record, row, job, state)


def _last_row(directory: Path) -> dict[str, Any]:
    """The newest row of a run's metrics; of several replicas that of the one that has come least far."""
    logs = [directory / METRICS, *sorted(directory.glob(f"[0-9]*/{METRICS}"))]
    rows = [row for row in map(metrics_log.last_row, logs) if row is not None]
    return min(rows, key=lambda row: int(row["step"]), default={})


def _tells_of_before(directory: Path, said_before: str | None) -> bool:
    """Whether a run that goes on, elsewhere or here again, still says how it stood before this job."""
    if not directory.is_symlink() and said_before is None:
        return False
    try:
        updated = str((RunDirectory.view(directory).read_status() or {}).get("updated"))
        if said_before is not None:
            return updated == said_before
        return datetime.fromisoformat(updated).timestamp() < math.floor(directory.lstat().st_mtime)
    except (ValueError, RunDirectoryError):
        return False


def _without_scheduler(sweep_dir: Path, row: SweepRow, *, is_submitted: bool) -> SweepRow:
    """Only the directory can be asked: whoever writes to it holds its lock."""
    if row.state == "missing":
        return dataclasses.replace(row, state="pending") if is_submitted else row
    if row.state != "running" or is_submitted:
        return row
    is_being_written = RunDirectory.view(sweep_dir / str(row.job)).is_being_written()
    if is_being_written is None:
        unknown = "may have ended: whether somebody writes to it cannot be told where locks do not work"
        return dataclasses.replace(row, error=unknown)
    if is_being_written:
        return row
    return dataclasses.replace(
        row, state="failed", error="ended without a word: nobody writes to it any more"
    )


def _ended(
    sweep_dir: Path, record: SweepRecord, row: SweepRow, job: SweepJob | None, state: SchedulerState
) -> SweepRow:
    """A job that has ended and is not done: its own words if it left any, else the scheduler's."""
    how = " ".join(part for part in (state.name, state.exit_code) if part)
    if row.error is not None and row.state == "failed":
        return dataclasses.replace(row, exit=how)
    if row.state == "stopped":
        launcher = launcher_in(sweep_dir, record.launcher_of(job))
        hint = going_on(sweep_dir / str(row.job), launcher, record.ranks)
        return dataclasses.replace(row, state="failed", exit=how, error=f"{row.error}; go on with {hint}")
    what = "ended before it began" if row.state == "missing" else "ended without a word"
    log = "" if row.id is None else f"; log: {log_paths(sweep_dir / SUBMITIT, row.id)[1]}"
    return dataclasses.replace(row, state="failed", exit=how, error=f"{what} ({how}){log}")


def wait(
    sweep_dir: Path,
    record: Callable[[], SweepRecord],
    states: Callable[[], States],
    poll_seconds: float,
    show: Callable[[list[SweepRow]], None] = lambda rows: None,
) -> list[SweepRow]:
    """Look at the jobs until the last one has ended, and return how they ended."""
    doubted: set[int] = set()
    while True:
        said = states()
        rows = look(sweep_dir, record(), said)
        # A network file system may show the end of a job before its last words: look once more.
        unsure = {row.job for row in rows if row.exit is not None and row.job not in doubted}
        doubted |= unsure
        rows = [dataclasses.replace(row, state="running") if row.job in unsure else row for row in rows]
        show(rows)
        # As long as the scheduler does not answer, a job that stopped may be on its way back into the queue.
        is_open = OPEN if said is not None else OPEN | {"stopped"}
        if not any(row.state in is_open for row in rows):
            return rows
        time.sleep(poll_seconds)


def follow(
    sweep_dir: Path,
    record: Callable[[], SweepRecord],
    states: Callable[[], States],
    poll_seconds: float,
    stream: TextIO | None = None,
) -> list[SweepRow]:
    """Show the jobs until the last one has ended, and return how they ended.

    A table that is drawn anew on a terminal, else a line every half minute and whenever a job changes state.
    """
    with _Display(sys.stderr if stream is None else stream) as display:
        return wait(sweep_dir, record, states, poll_seconds, display.show)


def live_table(rows: Sequence[SweepRow]) -> list[str]:
    """Lines of a table of jobs that go on: job, id, state, step, loss, verdict."""
    cells = []
    for row in rows:
        step = NOTHING if row.step is None else f"{row.step:,}/{row.steps or 0:,}"
        if row.choice_steps is not None:
            step = f"choice {row.choice_steps:,}"
        verdict = NOTHING if row.solved is None else "solved" if row.solved else "not solved"
        cells.append([str(row.job), row.id or NOTHING, _state(row), step, number(row.loss), verdict])
    return text_table(["job", "id", "state", "step", "loss", "verdict"], cells, left=3)


def hints(rows: Sequence[SweepRow]) -> list[str]:
    """A line for each reason for which jobs would wait in vain."""
    found = dict.fromkeys(row.waits_for for row in rows if row.waits_for is not None)
    return [f"{reason}: {_IN_VAIN[reason]}" for reason in found if reason in _IN_VAIN]


def _progress(row: SweepRow) -> str:
    if row.choice_steps is not None:
        return f"chooses among initialisations ({row.choice_steps} steps)"
    return f"{row.step or 0}/{row.steps}"


def _state(row: SweepRow) -> str:
    return row.state if row.waits_for is None else f"{row.state} ({row.waits_for})"


def counts(rows: Sequence[SweepRow]) -> str:
    """How many jobs are in which state: `3 running, 1 failed`."""
    states = [_state(row) for row in rows]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def traces(rows: Sequence[SweepRow]) -> Iterator[str]:
    """For every job that failed with one: the end of its traceback."""
    for row in rows:
        if row.state == "failed" and row.traceback:
            lines = row.traceback.rstrip().splitlines()
            shown = lines if len(lines) <= _TRACE_LINES else ["  …", *lines[-_TRACE_LINES:]]
            yield "\n".join([f"  job {row.job}:", *(f"    {line}" for line in shown)])


def _fitting(rows: Sequence[SweepRow], size: os.terminal_size) -> list[str]:
    """The table cut to one screen, since more cannot be drawn anew; jobs that wait or are done give way."""
    room = max(size.lines - _AROUND_ROWS, 1)
    order = sorted(rows, key=lambda row: _GIVE_WAY.get(row.state, 0))
    lines = live_table(sorted(order[:room], key=lambda row: row.job))
    lines += [f"  … and {len(rows) - room} more; all together: {counts(rows)}"] if len(rows) > room else []
    return [line[: size.columns - 1] for line in lines]


class _Display(contextlib.AbstractContextManager["_Display"]):
    def __init__(self, stream: TextIO) -> None:
        self._stream, self._drawn = stream, 0
        self._said, self._said_at = "", 0.0

    def show(self, rows: Sequence[SweepRow]) -> None:
        if is_terminal(self._stream):
            lines = [*_fitting(rows, shutil.get_terminal_size()), *hints(rows)]
            back = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
            show(back + "\n".join(lines), self._stream)
            self._drawn = len(lines)
        elif counts(rows) != self._said or time.monotonic() - self._said_at > _LINE_SECONDS:
            self._said, self._said_at = counts(rows), time.monotonic()
            steps = [f"job {row.job} {_progress(row)}" for row in rows if row.state == "running"]
            show("; ".join([f"jobs: {self._said}", *steps[:8], *hints(rows)]), self._stream)

    def __exit__(self, *exception: object) -> None:
        if self._drawn:  # the final table takes its place
            show(f"\x1b[{self._drawn}F\x1b[J", self._stream, end="")
