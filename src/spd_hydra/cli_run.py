"""Start what a command line asks for: one run, or the jobs of a sweep and the table after them."""

import secrets
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from spd_hydra import report
from spd_hydra.cli_hydra import call_hydra
from spd_hydra.cli_task import Task
from spd_hydra.composition import Composer
from spd_hydra.exit_code import ExitCode
from spd_hydra.overrides import is_for_hydra, quoted, read
from spd_hydra.plan import Plan, make_plan


def start(overrides: Sequence[str], *, multirun: bool, config_dir: str | None) -> int:
    """Check everything, then run it, and return the exit code.

    Raises:
        ConfigError: something is wrong; nothing was started.
        KeyboardInterrupt: the user stopped it.
    """
    with Composer.open(config_dir) as composer:
        plan = make_plan(composer, overrides, multirun=multirun, config_dir=config_dir)
    flags = ["--config-dir", config_dir] if config_dir else []
    return _sweep(plan, flags, config_dir) if plan.is_sweep else _single(plan, flags, config_dir)


def _single(plan: Plan, flags: list[str], config_dir: str | None) -> int:
    job = plan.jobs[0]
    overrides = plan.overrides
    if job.saved is not None:  # the other overrides fit the saved configuration, perhaps not the default one
        overrides = [f"resume={quoted(str(job.config.resume))}", *filter(is_for_hydra, overrides)]
    task = Task(sys.argv, job, config_dir)
    code = call_hydra([*flags, *overrides], task)
    return task.codes.get(0, code)


def _sweep(plan: Plan, flags: list[str], config_dir: str | None) -> int:
    directory = _sweep_directory(plan)
    task = Task(sys.argv, None, config_dir)
    words = ["-m", *flags, *plan.overrides, f"hydra.sweep.dir={quoted(str(directory))}"]
    try:
        code = call_hydra(words, task)
    finally:
        if directory.is_dir():
            rows = report.sweep_rows(directory, dict(enumerate(job.overrides for job in plan.jobs)))
            _, page = report.write_sweep(directory, rows)
            print(f"{report.sweep_table(rows)}\n  {page}")
    if code == ExitCode.ok and any(task.codes.values()):
        return ExitCode.jobs_failed
    return code


def _sweep_directory(plan: Plan) -> Path:
    """Where the jobs go: what `hydra.sweep.dir=` says, else a new folder; known before any job starts."""
    for override in map(read, reversed(plan.overrides)):
        if override is not None and override.key_or_group == "hydra.sweep.dir":
            return Path(str(override.value())).absolute()
    root = Path(plan.jobs[0].config.out_dir).expanduser().absolute()
    return root / "sweeps" / f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(3)}"
