"""Start what a command line asks for: one run, or the jobs of a sweep and the table after them."""

import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from hydra.core.plugins import Plugins

from hydra_plugins.spd_hydra import NAME, BackgroundLauncher
from spd_hydra import distributed
from spd_hydra.cli_hydra import call_hydra
from spd_hydra.cli_sweep import go_on, show_sweep, sweep_in, sweep_status, with_errors
from spd_hydra.cli_task import Task, of_the_disk
from spd_hydra.command_word import quoted
from spd_hydra.composer import Composer
from spd_hydra.composition import Job
from spd_hydra.config import Task as WhatToDo
from spd_hydra.exit_code import ExitCode
from spd_hydra.launcher import slurm, start, watch
from spd_hydra.launcher.record import FILE, SweepRecord, held, hide_secrets, make, new_sweep_directory
from spd_hydra.launcher.secret_check import require_no_secrets
from spd_hydra.launcher_config import Background, LocalParallel, Slurm
from spd_hydra.overrides import is_for_hydra, read
from spd_hydra.plan import Plan, make_plan
from spd_hydra.run_dir import RunDirectoryError
from spd_hydra.section import ConfigError
from spd_hydra.stop import Stopped, handled_by, heard
from spd_hydra.terminal import show

_IN_THIS_PROCESS = {WhatToDo.check, WhatToDo.prefetch, WhatToDo.sweep_status}


def begin(overrides: Sequence[str], *, multirun: bool, config_dir: str | None) -> int:
    """Check everything, then run it, and return the exit code.

    Raises:
        ConfigError: something is wrong; nothing was started.
        RunDirectoryError: a sweep could not write.
        KeyboardInterrupt: the user stopped it.
    """
    distributed.require_place()
    with _sigterm_raises():
        return _begin(overrides, multirun=multirun, config_dir=config_dir)


def _begin(overrides: Sequence[str], *, multirun: bool, config_dir: str | None) -> int:
    sweep = sweep_in(overrides)
    if sweep is not None:
        return go_on(sweep, overrides, multirun=multirun, config_dir=config_dir)
    with Composer.open(config_dir) as composer:
        plan = make_plan(composer, overrides, multirun=multirun, config_dir=config_dir)
    config = plan.jobs[0].config
    flags = ["--config-dir", config_dir] if config_dir else []
    if plan.is_sweep and config.run_dir is not None:
        raise ConfigError(
            f"run_dir: got {config.run_dir} in a sweep, whose jobs have folders of their own; choose where "
            "with hydra.sweep.dir="
        )
    if config.task is WhatToDo.sweep_status:
        return sweep_status(config)
    if config.task not in _IN_THIS_PROCESS:
        _require_one_process(plan)
    if config.task not in _IN_THIS_PROCESS and isinstance(config.launcher, Background):
        return _in_background(plan, config.launcher, flags, config_dir)
    if not plan.is_sweep:
        return _single(plan, flags, config_dir)
    do = _sweep_without_runs if config.task in _IN_THIS_PROCESS else _sweep
    return do(plan, flags, config_dir)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Within the block SIGTERM, SIGHUP and SIGUSR1 are heard as Ctrl-C is; exit code as of SIGTERM.

    A run that listens itself is asked, and saves; this is for the time before, between and after runs.
    """
    own = os.getpid()

    def hear(number: int, frame: object) -> None:
        if os.getpid() == own:
            raise Stopped(number)
        signal.signal(number, signal.SIG_DFL)  # a fork inherits this handler
        os.kill(os.getpid(), number)

    with handled_by(hear, *heard(signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)):
        yield


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
    code = _call(["-m", *flags, *plan.overrides], directory, task)
    return ExitCode.jobs_failed if code == ExitCode.ok and any(task.codes.values()) else code


def _call(words: Sequence[str], directory: Path, task: Task) -> int:
    """Let Hydra run the jobs of a sweep there.

    Raises:
        RunDirectoryError: the disk is full or read-only.
    """
    try:
        return call_hydra([*words, f"hydra.sweep.dir={quoted(str(directory))}"], task)
    except OSError as error:
        text = of_the_disk(error, directory)
        if text is None:
            raise
        raise RunDirectoryError(text) from error


def _sweep(plan: Plan, flags: list[str], config_dir: str | None) -> int:
    directory = _sweep_directory(plan)
    make(directory)
    with held(directory):
        try:
            record = start.write_down(dict(enumerate(plan.jobs)), directory, sys.argv)
        except RunDirectoryError as error:
            raise ConfigError(str(error)) from error

        order = dict(enumerate(plan.jobs))

        def on_start(number: int, job: Job) -> None:
            """A sweeper may take the jobs in another order than that of the plan, or choose as it goes."""
            nonlocal record
            if order.get(number) is not job:
                place = next((n for n, other in order.items() if other is job and n > number), number)
                order[place], order[number] = order.get(number, job), job
                changed = {n: order[n] for n in (number, place)}
                record = start.write_down(changed, directory, sys.argv)

        task = Task(sys.argv, plan, config_dir, on_start)
        try:
            return _swept(plan, flags, directory, task)
        finally:
            hide_secrets(directory)  # also where no job ran in this process
            show_sweep(directory, with_errors(watch.look(directory, record, None), task.errors))


def _in_background(plan: Plan, launcher: Background, flags: list[str], config_dir: str | None) -> int:
    """Through Hydra, whose sweeper calls our launcher: so any sweeper's jobs go the same way."""
    directory = _sweep_directory(plan)
    jobs = dict(enumerate(plan.jobs))
    if isinstance(launcher, Slurm):
        start.require_plain(directory)
    if isinstance(launcher, Slurm) and launcher.dry_run:
        text, is_refused = start.dry_run(jobs, launcher, directory)
        show(text)
        return ExitCode.bad_config if is_refused else ExitCode.ok
    for job in plan.jobs:
        require_no_secrets(job.config)
    if isinstance(launcher, Slurm):
        slurm.require_sbatch()
    is_here = isinstance(launcher, LocalParallel)
    if is_here:
        make(directory)
    # Hydra looks for plug-ins in folders and misses those of an editable installation.
    Plugins.instance().register(BackgroundLauncher)
    task = Task(sys.argv, plan, config_dir)
    words = ["-m", *flags, *plan.overrides, f"hydra/launcher={NAME}"]
    with held(directory) if is_here else contextlib.nullcontext():
        try:
            code = _call(words, directory, task)
        except KeyboardInterrupt:
            if is_here and (directory / FILE).exists():
                show_sweep(directory, watch.look(directory, SweepRecord.read(directory), None))
            raise
        if task.failure is not None:
            raise task.failure
        if code == ExitCode.ok and task.ended:
            return show_sweep(directory, task.ended)
        return code


def _sweep_directory(plan: Plan) -> Path:
    """Where the jobs go: what `hydra.sweep.dir=` says, else a new folder; known before any job starts.

    Raises:
        ConfigError: it is not known yet, or holds another sweep, whose results would be taken for these.
    """
    given = [override for override in map(read, reversed(plan.overrides)) if override is not None]
    for override in given:
        if override.key_or_group == "hydra.sweep.subdir":
            raise ConfigError(
                f"hydra.sweep.subdir: got {override.value()}, but the jobs of a sweep lie in folders with "
                "their numbers, where its table and resume= look for them; leave it out"
            )
    for override in given:
        if override.key_or_group == "hydra.sweep.dir":
            place = str(override.value())
            if "${" in place:
                raise ConfigError(
                    f"hydra.sweep.dir: got {place}, which has a value only when the sweep has begun; write "
                    "the directory out, or leave it out for a new one below out_dir"
                )
            directory = Path(place).absolute()
            if (directory / FILE).exists() or any(directory.glob("*/config.yaml")):
                raise ConfigError(
                    f"hydra.sweep.dir: got {place}, which holds a sweep already; choose another, or "
                    f"go on with it: resume={place}"
                )
            return directory
    return new_sweep_directory(plan.jobs[0].config.out_dir)
