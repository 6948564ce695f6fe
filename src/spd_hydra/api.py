"""Decompositions from Python: start one, open a finished one."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_hydra.analyse import require_single
from spd_hydra.components import load_plugins
from spd_hydra.composer import Composer
from spd_hydra.composition import compose as compose
from spd_hydra.composition import require_texts, settled
from spd_hydra.config import RunConfig, Task
from spd_hydra.launcher import start
from spd_hydra.launcher.handle import JobFailed as JobFailed
from spd_hydra.launcher.handle import JobHandle
from spd_hydra.launcher.job import begin_or_go_on
from spd_hydra.launcher.record import FILE as SWEEP
from spd_hydra.launcher.record import new_sweep_directory
from spd_hydra.launcher_config import Slurm
from spd_hydra.opened_run import Run as Run
from spd_hydra.opened_sweep import Sweep as Sweep
from spd_hydra.overrides import assignment
from spd_hydra.plan import make_plan
from spd_hydra.run import run
from spd_hydra.saved_config import load_config
from spd_hydra.section import ConfigError
from spd_hydra.sources import elsewhere

_LEAVES_NO_RUN = {
    Task.check: "call spd_hydra.run.run(config), or spd-run task=check",
    Task.prefetch: "call spd_hydra.run.run(config), or spd-run task=prefetch",
    Task.sweep_status: "call spd-run task=sweep_status sweep=<directory>",
}
"""Tasks that decompose() refuses, with what does them."""


def load_run(
    path: str | Path, *, trust_remote_code: bool = False, moved: Mapping[str, str] | None = None
) -> Run:
    """Open a run directory.

    Args:
        path: the directory.
        trust_remote_code: allow `.model` to run the Python code that came with the target, where the run has
            `model.trust_remote_code`.
        moved: where its model or text lies now, as `{"model.name": "models/mine"}`; whether they are the same
            is found out when they are used.

    Raises:
        ConfigError: it is no run directory, of a version that this one cannot read, of a sweep, or of several
            replicas.
    """
    load_plugins()  # whose sections the configuration may name
    path = Path(path).expanduser()
    if (path / SWEEP).is_file():
        raise ConfigError(f"{path} is a sweep: open it with load_sweep, or one of its runs, {path / '0'}")
    config = load_config(path / "config.yaml", keeps_unknown_terms=True)
    require_single(path, config)
    return Run(path, config if moved is None else elsewhere(config, moved), trust_remote_code)


def load_sweep(path: str | Path, *, trust_remote_code: bool = False) -> Sweep:
    """Open the directory of a sweep: `rows` is its table, `runs` are its runs; warns of those not done.

    Args:
        path: the directory, which holds `sweep.json`.
        trust_remote_code: as for `load_run`, for every run.

    Raises:
        ConfigError: it is no directory of a sweep.
    """
    load_plugins()
    sweep = Sweep(Path(path).expanduser(), trust_remote_code)
    sweep.say_what_is_not_done()
    return sweep


def decompose(config: RunConfig | Sequence[str] = ()) -> Run:
    """Train a decomposition in this process and open its run directory.

    `decompose(["resume=<run directory>", "train.steps=30000"])` goes on with a run, and
    `decompose(["task=analyse", "run=<run directory>", "eval.batches=50"])` measures one again.

    Args:
        config: a whole configuration, or overrides as on the command line.

    Raises:
        ConfigError: the configuration cannot work; nothing was trained and no directory made.
        RunError: training failed.
    """
    # A whole configuration may have been changed since it was checked.
    config = settled(config) if isinstance(config, RunConfig) else compose(config)
    if config.task in _LEAVES_NO_RUN:
        raise ConfigError(
            f"task: got {config.task.name}, which makes no run directory that decompose() could return; "
            f"{_LEAVES_NO_RUN[config.task]}"
        )
    if config.train.replicas > 1:
        raise ConfigError(
            f"train.replicas: got {config.train.replicas}, but decompose() returns one run; train them with "
            "spd-run, then open each with load_run(...)"
        )
    directory = config.own_directory
    outcome = run(config) if directory is None else begin_or_go_on(config, str(directory), None)
    assert outcome.run_dir is not None, "the tasks that make none were refused"
    return load_run(outcome.run_dir, trust_remote_code=True)  # it has run here already


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubmittedRun(JobHandle):
    """A run that was submitted to a cluster: `job_id`, `run_dir`, `state()`, `result()`."""

    def result(self, poll_seconds: float = 2.0) -> Run:
        """Wait until it has ended, and open its run directory.

        Raises:
            JobFailed: it failed; the message says why.
        """
        self.wait(poll_seconds)
        return load_run(self.run_dir, trust_remote_code=True)  # who submitted it allowed that


def submit(
    overrides: Sequence[str] = (), *, config_dir: Path | str | None = None, **options: Any
) -> list[SubmittedRun]:
    """Submit runs to a SLURM cluster, several as one array, and return at once.

    `submit(["experiment=tms_5-2", "seed=range(5)"], partition="gpu", time="12:00:00", gpus=2)`

    Args:
        overrides: as on the command line; comma-separated values and ranges make several runs.
        config_dir: a further folder of YAML files, as `--config-dir`.
        options: keys of `launcher=slurm`: partition, time, memory, gpus, nodes, cpus, account, setup, ...

    Raises:
        ConfigError: a configuration cannot work, or the cluster refuses the jobs; nothing was submitted.
    """
    require_texts(overrides, "submit")
    words = [*overrides, "launcher=slurm"]
    words += [assignment(f"launcher.{name}", value) for name, value in options.items()]
    with Composer.open(config_dir) as composer:
        plan = make_plan(composer, words, multirun=True, config_dir=config_dir)
    launcher = plan.jobs[0].config.launcher
    assert isinstance(launcher, Slurm), "it was chosen above"
    if launcher.dry_run:
        raise ConfigError("launcher.dry_run: got true, but submit() submits; look at the script with spd-run")
    sweep_dir = new_sweep_directory(plan.jobs[0].config.out_dir)
    command = ["submit", *words]
    record = start.submit(dict(enumerate(plan.jobs)), launcher, sweep_dir, command)
    return [SubmittedRun(sweep_dir=sweep_dir, number=job.number, job_id=str(job.id)) for job in record.jobs]
