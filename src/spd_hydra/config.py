"""RunConfig: everything that a run depends on, typed, checked, and saved with it."""

import dataclasses
from collections.abc import Iterator
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from spd_hydra import distributed
from spd_hydra.ci_fn.base import CausalImportanceFn
from spd_hydra.data.base import DataSource
from spd_hydra.decomposition.config import Decomposition
from spd_hydra.hardware import Check
from spd_hydra.launcher_config import Background, Launcher
from spd_hydra.logger.base import LoggerSpec
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.persistent_recon import PersistentPGDRecon
from spd_hydra.model.base import TargetSpec
from spd_hydra.model.training import TrainableTarget
from spd_hydra.section import (
    Problem,
    Section,
    all_problems,
    children,
    option,
)
from spd_hydra.trainer_config import Evaluation, Training


class Task(Enum):
    """What a run does."""

    decompose = "decompose"
    train_target = "train_target"
    analyse = "analyse"
    check = "check"
    prefetch = "prefetch"
    sweep_status = "sweep_status"


class Device(Enum):
    """Where a run computes. `auto`: a GPU if there is one."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


@dataclasses.dataclass(kw_only=True)
class Suite(Section):
    """Experiments under one name, each a run of its own."""

    experiments: list[str] = option(default_factory=list, help="experiments of the suite, in its YAML file")


@dataclasses.dataclass(kw_only=True)
class RunConfig(Section):
    """One run."""

    name: str = option(help="names the folder of the run's outputs and its row in a sweep table")
    task: Task = option(
        Task.decompose, "decompose | train_target | analyse | check | prefetch | sweep_status"
    )
    seed: int = option(0, "seed of the target, the data, the masks and the initial values", ge=0)
    device: Device = option(Device.auto, "auto | cpu | cuda; auto takes a GPU if there is one")
    threads: int = option(0, "CPU threads; 0: as many as the machine offers", ge=0, le=1024)
    out_dir: str = option("outputs", "folder of all runs; default $SPD_OUT_DIR or ./outputs")
    cache_dir: str = option(
        "~/.cache/spd_hydra", "trained targets; default $SPD_CACHE_DIR or ~/.cache/spd_hydra"
    )
    run: str | None = option(None, "run directory, for task=analyse")
    sweep: str | None = option(None, "directory of a sweep, for task=sweep_status")
    resume: str | None = option(None, "run directory to go on with, using its saved configuration")
    run_dir: str | None = option(
        None,
        "directory of this one run, in place of a new one below out_dir; a run that is there goes on",
        saved=False,
    )
    start_from: str | None = option(
        None, "run directory or checkpoint that a new run begins with: its target, subcomponents and step"
    )
    start_anew: bool = option(
        False, "with start_from: take its target and parameters alone, and begin at step 0"
    )
    trust_remote_code: bool = option(
        False,
        "run the Python code that came with the model of a saved run, for resume= and task=analyse",
        saved=False,
    )
    allow_extra: bool = option(False, "accept keys that no section declares")
    model: TargetSpec = option(MISSING, "the target")
    target_steps: int | None = option(
        None,
        "train a target in one try of at most so many steps, to try things out; null: as in model.training",
        ge=1,
    )
    data: DataSource = option(MISSING, "where inputs come from")
    decomposition: Decomposition = option(default_factory=Decomposition, help="what is decomposed")
    ci_fn: CausalImportanceFn = option(MISSING, "what predicts causal importances")
    loss: LossSet = option(default_factory=LossSet, help="the training loss")
    train: Training = option(default_factory=Training, help="optimiser, schedule, checkpoints")
    eval: Evaluation = option(default_factory=Evaluation, help="measurements during and after training")
    objective: str = option("loss/total", "metric of the last evaluation that sweepers optimise")
    logger: LoggerSpec = option(default_factory=LoggerSpec, help="where metrics go besides the run directory")
    launcher: Launcher = option(default_factory=Launcher, help="where jobs run", saved=False)
    check: Check = option(default_factory=Check, help="what task=check estimates for", saved=False)
    suite: Suite = option(default_factory=Suite, help="several experiments at once, as a sweep", saved=False)

    def __post_init__(self) -> None:
        """Bring `model.training` down to `target_steps` and settle the divergence, for all to read there."""
        if self.target_steps and isinstance(self.model, TrainableTarget):
            recipe = self.model.training
            training = dataclasses.replace(recipe, steps=min(recipe.steps, self.target_steps), max_tries=1)
            self.model = dataclasses.replace(self.model, training=training)  # others may share the old one
        if self.loss.divergence is Divergence.auto:
            settled = Divergence.kl if self.model.gives_logits() else Divergence.mse
            self.loss = dataclasses.replace(self.loss, divergence=settled)
        super().__post_init__()

    @property
    def own_directory(self) -> Path | None:
        """Where `run_dir` says that the run is; None: in a new folder below `out_dir`."""
        return None if self.run_dir is None else Path(self.run_dir).expanduser().absolute()

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        yield from self._about_the_task()
        yield from self._about_ranks()
        yield from self._about_the_loss()
        if not self.decomposition.sites and not self.decomposition.identities:
            yield Problem(
                "decomposition.sites", "got none; name at least one matrix, e.g. decomposition=tms_5-2"
            )

    def _about_the_task(self) -> Iterator[Problem]:
        if self.task is Task.analyse and self.run is None:
            yield Problem(
                "run", "task=analyse needs the directory of a run, e.g. run=outputs/tms_5-2/<time>_<id>"
            )
        if self.task is not Task.analyse and self.run is not None:
            yield Problem(
                "run", f"got {self.run}, which only task=analyse reads; to go on with a run use resume="
            )
        if self.task is not Task.sweep_status and self.sweep is not None:
            yield Problem(
                "sweep", f"got {self.sweep}, which only task=sweep_status reads; add that, or leave it out"
            )
        yield from self._about_its_directory()
        yield from self._about_the_start()
        if self.trust_remote_code and self.task is not Task.analyse and self.resume is None:
            yield Problem(
                "trust_remote_code",
                "got true, which only resume= and task=analyse read; for a new run it is "
                "model.trust_remote_code",
            )
        if self.device is Device.cuda and isinstance(self.launcher, Background) and not self.launcher.gpus:
            yield Problem(
                "launcher.gpus",
                f"got 0 for device=cuda; launcher={self.launcher.kind} gives a job the "
                "GPUs that are asked for, e.g. launcher.gpus=1",
            )
        if self.suite.experiments:  # the command line has put its experiments in its place before
            listed = ", ".join(self.suite.experiments)
            yield Problem(
                "suite",
                f"got {listed}, must be none for a single run; give one of them as experiment=…, or start "
                "all with suite=… from the command line or submit()",
            )

    def _about_its_directory(self) -> Iterator[Problem]:
        if self.run_dir is None:
            return
        got = f"got {self.run_dir}"
        if self.resume is not None:
            yield Problem(
                "run_dir", f"{got} with resume={self.resume}, which has its directory: leave one out"
            )
        if isinstance(self.launcher, Background):
            yield Problem(
                "run_dir",
                f"{got} with launcher={self.launcher.kind}, whose jobs have folders of their own in which "
                "they go on; choose where with hydra.sweep.dir=",
            )
        if self.task not in {Task.decompose, Task.train_target}:
            yield Problem("run_dir", f"{got} with task={self.task.name}, which begins no run: leave it out")

    def _about_the_start(self) -> Iterator[Problem]:
        if self.start_from is None:
            if self.start_anew:
                yield Problem("start_anew", "got true without start_from=<run directory or checkpoint>")
            return
        if self.train.replicas > 1:
            yield Problem(
                "train.replicas",
                f"got {self.train.replicas} with start_from, must be 1: a start has one set of subcomponents",
            )
        if self.task in {Task.train_target, Task.prefetch}:
            yield Problem(
                "start_from", f"got {self.start_from} with task={self.task.name}, which decomposes nothing"
            )

    def _about_ranks(self) -> Iterator[Problem]:
        ranks = max(self.launcher.ranks, distributed.started_with())
        if self.train.replicas > 1 and ranks > 1:
            yield Problem(
                "train.replicas",
                f"got {self.train.replicas} with {ranks} ranks; replicas share one process. Give each GPU a "
                "job of its own: a sweep over seeds, with launcher.gpus=1",
            )
        most = self.train.batch_size // ranks
        if ranks > 1 and self.train.accumulate > max(most, 1):
            yield Problem(
                "train.accumulate",
                f"got {self.train.accumulate} with train.batch_size={self.train.batch_size} on {ranks} "
                f"ranks, must be ≤ {most}: a part has a row at least",
            )

    def _about_the_loss(self) -> Iterator[Problem]:
        measurable = {
            name for name, term in self.loss.terms().items() if not isinstance(term, PersistentPGDRecon)
        }
        for name in self.eval.also:
            if name not in measurable:
                listed = ", ".join(sorted(measurable))
                yield Problem("eval.also", f"got {name}, must be loss terms among {listed}")
        if self.train.replicas > 1 and self.loss.lasting_terms():
            yield Problem(
                "train.replicas",
                f"got {self.train.replicas} with {', '.join(self.loss.lasting_terms())}, whose sources last, "
                "must be 1; make runs of their own with a sweep over seeds",
            )
        if not self.loss.active_terms():
            yield Problem("loss", "all coefficients are 0, so there is nothing to train; try loss=delta")


def problems(config: RunConfig) -> list[Problem]:
    """Everything wrong with a configuration, with full keys."""
    return list(all_problems(config))


def sections(config: Section, prefix: str = "") -> Iterator[tuple[str, Section]]:
    """A section and all sections inside it, with their full keys."""
    yield prefix, config
    for key, child in children(config):
        yield from sections(child, f"{prefix}.{key}" if prefix else key)
