"""Start what a command line asks for: one run, or the jobs of a sweep and the table after them."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from hydra.core.plugins import Plugins

from hydra_plugins.spd_hydra import NAME, BackgroundLauncher
from spd_hydra import distributed, report
from spd_hydra.cli_hydra import call_hydra
from spd_hydra.cli_task import Task
from spd_hydra.command_word import quoted
from spd_hydra.composer import Composer
from spd_hydra.composition import Job
from spd_hydra.config import RunConfig
from spd_hydra.config import Task as WhatToDo
from spd_hydra.exit_code import ExitCode
from spd_hydra.launcher import slurm, start, watch
from spd_hydra.launcher.record import FILE, SweepRecord, hide_secrets, new_sweep_directory
from spd_hydra.launcher.secret_check import require_no_secrets
from spd_hydra.launcher_config import Background, LocalParallel, Slurm
from spd_hydra.overrides import is_for_hydra, read
from spd_hydra.plan import Plan, make_plan
from spd_hydra.report.sweep import SweepRow
from spd_hydra.section import ConfigError
from spd_hydra.terminal import show

_IN_THIS_PROCESS = {WhatToDo.check, WhatToDo.prefetch, WhatToDo.sweep_status}


def begin(overrides: Sequence[str], *, multirun: bool, config_dir: str | None) -> int:
    """Check everything, then run it, and return the exit code.

    Raises:
        ConfigError: something is wrong; nothing was started.
        KeyboardInterrupt: the user stopped it.
    """
    with Composer.open(config_dir) as composer:
        plan = make_plan(composer, overrides, multirun=multirun, config_dir=config_dir)
    config = plan.jobs[0].config
    flags = ["--config-dir", config_dir] if config_dir else []
    if config.task is WhatToDo.sweep_status:
        return sweep_status(config)
    if config.task not in _IN_THIS_PROCESS:
        _require_one_process(plan)
    if config.task not in _IN_THIS_PROCESS and isinstance(config.launcher, Background):
        return _in_background(plan, config.launcher, flags, config_dir)
    if not plan.is_sweep:
        return _single(plan, flags, config_dir)
    sweep = _sweep_without_runs if config.task in _IN_THIS_PROCESS else _sweep
    return sweep(plan, flags, config_dir)


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
    record = SweepRecord.read(directory)
    rows = watch.look(directory, record, watch.scheduler_states(record))
    if any(row.state in watch.OPEN for row in rows):
        show("\n".join(["", *watch.live_table(rows)]))
    return _show(directory, rows)


def _require_one_process(plan: Plan) -> None:
    """Refuse what several processes that were started to train one decomposition cannot do together.

    Raises:
        ConfigError: jobs would be started, by each of them.
    """
    ranks, launcher = distributed.started_with(), plan.jobs[0].config.launcher
    if ranks == 1:
        return
    if plan.is_sweep:
        raise ConfigError(
            f"-m: got a sweep in each of {ranks} processes, which train one decomposition together; start it "
            f"with spd-run alone: launcher.ranks_per_node={ranks} gives every job as many processes"
        )
    if isinstance(launcher, Background) or launcher.local_ranks > 1:
        raise ConfigError(
            f"launcher: got {launcher.kind}, which would start processes, in each of {ranks} that train one "
            "decomposition together; leave it out, or start spd-run alone"
        )


def _single(plan: Plan, flags: list[str], config_dir: str | None) -> int:
    job = plan.jobs[0]
    overrides = plan.overrides
    if job.saved is not None:  # the other overrides fit the saved configuration, perhaps not the default one
        overrides = [f"resume={quoted(str(job.config.resume))}", *filter(is_for_hydra, overrides)]
    task = Task(sys.argv, plan, config_dir)
    code = call_hydra([*flags, *overrides], task)
    return task.codes.get(0, code)


def _sweep_without_runs(plan: Plan, flags: list[str], config_dir: str | None) -> int:
    """Jobs that only say something: the folders that Hydra makes for each would stay empty."""
    with tempfile.TemporaryDirectory(prefix="spd-run-") as directory:
        task = Task(sys.argv, plan, config_dir)
        return _swept(plan, flags, Path(directory), task)


def _swept(plan: Plan, flags: list[str], directory: Path, task: Task) -> int:
    code = call_hydra(["-m", *flags, *plan.overrides, f"hydra.sweep.dir={quoted(str(directory))}"], task)
    return ExitCode.jobs_failed if code == ExitCode.ok and any(task.codes.values()) else code


def _sweep(plan: Plan, flags: list[str], config_dir: str | None) -> int:
    directory, launcher = _sweep_directory(plan), plan.jobs[0].config.launcher
    record = start.new_record(launcher, dict(enumerate(plan.jobs)), sys.argv)

    def on_start(number: int, job: Job) -> None:
        """A sweeper may take the jobs in another order than they were planned in, or choose as it goes."""
        nonlocal record
        record = record.with_jobs(start.new_record(launcher, {number: job}, sys.argv).jobs)
        record.write(directory)

    task = Task(sys.argv, plan, config_dir, on_start)
    _make(directory)
    record.write(directory)
    try:
        return _swept(plan, flags, directory, task)
    finally:
        hide_secrets(directory)  # also where no job ran in this process
        _show(directory, watch.look(directory, record, None))


def _in_background(plan: Plan, launcher: Background, flags: list[str], config_dir: str | None) -> int:
    """Through Hydra, whose sweeper calls our launcher: so any sweeper's jobs go the same way."""
    directory = _sweep_directory(plan)
    jobs = dict(enumerate(plan.jobs))
    if isinstance(launcher, Slurm) and launcher.dry_run:
        text, is_refused = start.dry_run(jobs, launcher, directory)
        show(text)
        return ExitCode.bad_config if is_refused else ExitCode.ok
    for job in plan.jobs:
        require_no_secrets(job.config)
    if isinstance(launcher, Slurm):
        slurm.require_sbatch()
    # Hydra looks for plug-ins in folders and misses those of an editable installation.
    Plugins.instance().register(BackgroundLauncher)
    task = Task(sys.argv, plan, config_dir)
    words = ["-m", *flags, *plan.overrides, f"hydra/launcher={NAME}"]
    try:
        code = call_hydra([*words, f"hydra.sweep.dir={quoted(str(directory))}"], task)
    except KeyboardInterrupt:
        if isinstance(launcher, LocalParallel) and (directory / FILE).exists():
            _show(directory, watch.look(directory, SweepRecord.read(directory), None))
        raise
    if task.failure is not None:
        raise task.failure
    if code == ExitCode.ok and task.ended:
        return _show(directory, task.ended)
    return code


def _show(directory: Path, rows: Sequence[SweepRow]) -> int:
    """Write sweep.csv and sweep.html, print the table, and say with the exit code whether a job failed."""
    has_failed = any(row.state == "failed" for row in rows)
    rows = report.with_replicas(directory, rows)
    try:
        _, page = report.write_sweep(directory, rows)
        written = str(page)
    except OSError as error:  # somebody else's sweep, or a full disk: the rows are worth more than the page
        written = f"sweep.csv and sweep.html could not be written: {error.strerror}: {error.filename}"
    show("\n".join([report.sweep_table(rows), report.published_table(rows), *watch.traces(rows)]))
    show(f"  {written}")
    return ExitCode.jobs_failed if has_failed else ExitCode.ok


def _sweep_directory(plan: Plan) -> Path:
    """Where the jobs go: what `hydra.sweep.dir=` says, else a new folder; known before any job starts.

    Raises:
        ConfigError: it is not known yet, or holds another sweep, whose results would be taken for these.
    """
    for override in map(read, reversed(plan.overrides)):
        if override is not None and override.key_or_group == "hydra.sweep.dir":
            given = str(override.value())
            if "${" in given:
                raise ConfigError(
                    f"hydra.sweep.dir: got {given}, which has a value only when the sweep has begun; write "
                    "the directory out, or leave it out for a new one below out_dir"
                )
            directory = Path(given).absolute()
            if (directory / FILE).exists() or any(directory.glob("*/config.yaml")):
                raise ConfigError(
                    f"hydra.sweep.dir: got {given}, which holds a sweep already; choose another, or "
                    f"go on with one of its runs: resume={given}/<number>"
                )
            return directory
    return new_sweep_directory(plan.jobs[0].config.out_dir)


def _make(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{directory}: the sweep cannot be written there: {error.strerror}") from error
