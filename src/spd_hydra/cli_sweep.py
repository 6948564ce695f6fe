"""Sweeps that there are already: how they stand, their tables, and going on with what is left of one."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from spd_hydra import distributed, report
from spd_hydra.cli_task import Task
from spd_hydra.composer import Composer
from spd_hydra.composition import Job
from spd_hydra.config import RunConfig
from spd_hydra.counted import counted
from spd_hydra.exit_code import ExitCode
from spd_hydra.launcher import start, unfinished, watch
from spd_hydra.launcher.record import FILE, SweepRecord, held
from spd_hydra.launcher_config import Background, Launcher, Slurm
from spd_hydra.overrides import typed_path
from spd_hydra.report.sweep import SweepRow
from spd_hydra.section import ConfigError
from spd_hydra.terminal import show


def sweep_status(config: RunConfig) -> int:
    """Show how the jobs of a sweep stand, and write its table and page anew.

    Raises:
        ConfigError: no sweep was named, or there is none.
    """
    if config.sweep is None:
        raise ConfigError(
            "sweep: task=sweep_status needs the directory of a sweep, e.g. sweep=outputs/sweeps/<time>_<id>"
        )
    directory = Path(config.sweep).expanduser().absolute()
    rows, is_running = watch.stand(directory)
    if any(row.state in watch.OPEN for row in rows):
        show("\n".join(["", *watch.live_table(rows), *watch.hints(rows)]))
    return show_sweep(directory, rows, is_running=is_running)


def show_sweep(directory: Path, rows: Sequence[SweepRow], *, is_running: bool = False) -> int:
    """Write sweep.csv and sweep.html, print the table, and say with the exit code whether a job failed.

    Args:
        directory: the directory of the sweep.
        rows: its jobs.
        is_running: whether somebody else runs them; if not, and some are left, how to go on is printed.
    """
    has_failed = any(row.state == "failed" for row in rows)
    rest = [] if is_running else unfinished.to_do(directory, rows)
    rows = report.with_replicas(directory, rows)
    try:
        _, page = report.write_sweep(directory, rows)
        written = str(page)
    except OSError as error:  # somebody else's sweep, or a full disk: the rows are worth more than the page
        place = error.filename or directory
        written = f"sweep.csv and sweep.html could not be written: {error.strerror}: {place}"
    show("\n".join([report.sweep_table(rows), report.published_table(rows), *watch.traces(rows)]))
    show(f"  {written}")
    if rest and (line := unfinished.line_to_type(directory)) is not None:
        show(f"  {counted(len(rest), 'job')} not done; go on with: {line}")
    return ExitCode.jobs_failed if has_failed else ExitCode.ok


def with_errors(rows: Sequence[SweepRow], errors: Mapping[int, str]) -> list[SweepRow]:
    """The rows, with the errors of jobs that could not write them down themselves."""
    return [
        dataclasses.replace(row, state="failed", error=errors[row.job].splitlines()[0])
        if row.job in errors and row.state == "missing"
        else row
        for row in rows
    ]


def sweep_in(overrides: Sequence[str]) -> Path | None:
    """The sweep that `resume=` names; None where it names none, but perhaps a run."""
    given = typed_path(overrides, "resume")
    return Path(given).absolute() if given is not None and Path(given, FILE).is_file() else None


def go_on(directory: Path, overrides: Sequence[str], *, multirun: bool, config_dir: str | None) -> int:
    """Go on with the jobs of a sweep that stopped, failed, were killed or never began.

    Raises:
        ConfigError: they cannot go on; nothing was started.
        RunDirectoryError: a disk is full or read-only.
        KeyboardInterrupt: the user stopped it.
    """
    if multirun:
        raise ConfigError(f"-m: resume={directory} is a sweep, which has its jobs already; leave it out")
    if (ranks := distributed.started_with()) > 1:
        raise ConfigError(f"resume: got a sweep in each of {ranks} processes; start spd-run alone")
    record = SweepRecord.read(directory)
    with Composer.open(config_dir) as composer:
        launcher = unfinished.launcher_for(composer, directory, record.launcher, overrides)
    with contextlib.ExitStack() as running:
        running.enter_context(held(directory))
        rows = watch.look(directory, record, _states(record))
        numbers = unfinished.to_do(directory, rows)
        trusted = unfinished.is_trusted(overrides)
        jobs = unfinished.jobs_of(directory, record, numbers, launcher, trusted=trusted)
        if isinstance(launcher, Slurm) and launcher.dry_run:
            text, is_refused = start.dry_run(jobs, launcher, directory)
            show(text)
            return ExitCode.bad_config if is_refused else ExitCode.ok
        _say_what_is_done(rows, jobs)
        if not jobs:
            return show_sweep(directory, rows)
        # A cluster knows itself what waits and runs, once it has the jobs.
        on_submitted = running.close if isinstance(launcher, Slurm) else lambda: None
        return _run_rest(directory, jobs, launcher, config_dir, on_submitted)


def _states(record: SweepRecord) -> watch.States:
    """What SLURM says of jobs that it was given.

    Raises:
        ConfigError: it does not answer, so that a job could be begun that waits there already.
    """
    found = watch.scheduler_states(record)
    ids = [job.id for job in record.jobs if job.id is not None and record.launcher_of(job) == "slurm"]
    if ids and found is None:
        raise ConfigError(
            "resume: SLURM does not answer, so nobody knows which jobs still wait or run; go on where "
            f"squeue answers (the jobs are {', '.join(ids[:3])}{', …' if len(ids) > 3 else ''})"
        )
    return found


def _say_what_is_done(rows: Sequence[SweepRow], jobs: Mapping[int, Job]) -> None:
    left = [row for row in rows if row.job not in jobs]
    alone = [f"{row.job} ({row.state})" for row in left if row.state != "done"]
    done = len(left) - len(alone)
    if alone:
        show(f"left alone, since they wait or run: {counted(len(alone), 'job')} {', '.join(alone)}")
    if jobs:
        show(f"going on with {counted(len(jobs), 'job')}: {', '.join(map(str, jobs))}; {done} done")
    elif not alone:
        show(f"all {counted(done, 'job')} done: nothing left to do")


def _run_rest(
    directory: Path,
    jobs: Mapping[int, Job],
    launcher: Launcher,
    config_dir: str | None,
    on_submitted: Callable[[], None],
) -> int:
    try:
        if isinstance(launcher, Background):
            rows = start.run_in_background(jobs, directory, sys.argv, on_submitted)
            return ExitCode.ok if rows is None else _shown(directory)
        task = Task(sys.argv, None, config_dir)
        start.write_down(jobs, directory, sys.argv)
        for number, job in jobs.items():
            task.do(number, lambda job=job: job, directory / str(number))  # type: ignore[misc]
        return _shown(directory, task.errors)
    except KeyboardInterrupt:
        if not isinstance(launcher, Slurm):
            _shown(directory)
        raise


def _shown(directory: Path, errors: Mapping[int, str] | None = None) -> int:
    record = SweepRecord.read(directory)
    rows = watch.look(directory, record, watch.scheduler_states(record))
    return show_sweep(directory, with_errors(rows, errors or {}))
