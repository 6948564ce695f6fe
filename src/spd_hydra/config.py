"""RunConfig: everything that a run depends on, typed, checked, and saved with it."""

import dataclasses
import logging
import typing
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import MISSING, OmegaConf

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
from spd_hydra.loss.unknown import unknown_term
from spd_hydra.model.base import TargetSpec
from spd_hydra.model.training import TrainableTarget
from spd_hydra.run_files import BEGINNING, is_beginning
from spd_hydra.section import (
    ConfigError,
    Problem,
    Section,
    all_problems,
    checks_deferred,
    children,
    kind_of,
    option,
    registered,
)
from spd_hydra.trainer_config import Evaluation, Training

log = logging.getLogger(__name__)

KIND = "_kind_"
"""Key that names the class of a pluggable section in plain data; no field begins with an underscore."""

_TERMS, _EXTRA = "loss_term", "loss.extra."  # the group of plug-ins' loss terms, and where they stand


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


def to_dict(config: Section) -> dict[str, Any]:
    """Plain data of what a section saves, with `_kind_` beside the fields of every pluggable one."""
    kind = kind_of(type(config))
    found: dict[str, Any] = {KIND: kind} if kind else {}
    for field in dataclasses.fields(config):
        if field.metadata.get("saved", True):
            found[field.name] = _plain(getattr(config, field.name))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return to_dict(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def to_yaml(config: RunConfig) -> str:
    """The text of `config.yaml` in a run directory."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def from_dict(data: Mapping[str, Any], *, keeps_unknown_terms: bool = False) -> RunConfig:
    """The configuration that `to_dict` gave; what is not saved has its default.

    Args:
        data: the plain data.
        keeps_unknown_terms: loss terms of plug-ins that are not here stay as they were saved, with a
            warning; they cannot be computed.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range, an unknown kind, an interpolation.
    """
    for field in dataclasses.fields(RunConfig):
        if field.name in data and not field.metadata.get("saved", True):
            raise ConfigError(
                f"{field.name}: a saved configuration has none; it is chosen when a run is started"
            )
    schema = OmegaConf.structured(RunConfig)
    if KIND in data:
        raise ConfigError(f"{KIND}: a run is of no kind, got {data[KIND]!r}")
    try:
        for key, text in _texts(data):
            if "${" in text:  # it could carry a variable of the environment into what is written down
                raise ConfigError(f"{key}: got {text!r}, but what was saved has values, not references")
        for path, kind in _kinds(data):
            group, _, name = kind.partition("/")
            classes = registered(group)
            if name not in classes and keeps_unknown_terms and group == _TERMS and path.startswith(_EXTRA):
                log.warning("%s is of kind %s, which no plug-in here has: it is kept as saved", path, kind)
                classes[name] = unknown_term(kind, _at(data, path))
            if name not in classes:
                raise ConfigError(_unknown_kind(path, kind, classes))
            if not any(isinstance(a, type) and issubclass(classes[name], a) for a in _declared(schema, path)):
                raise ConfigError(f"{path}: cannot be of kind {kind!r}")
            OmegaConf.update(schema, path, OmegaConf.structured(classes[name]), force_add=True)
        merged = OmegaConf.merge(schema, _without_kinds(data))
        with checks_deferred():
            config = cast(RunConfig, OmegaConf.to_object(merged))
    except ConfigError:
        raise
    except Exception as error:  # OmegaConf has many, all of them about this file
        raise ConfigError(f"the saved configuration does not fit this version: {error}") from error
    if wrong := problems(config):
        raise ConfigError("; ".join(str(problem) for problem in wrong))
    return config


def _at(data: Mapping[str, Any], path: str) -> dict[str, Any]:
    found: Any = data
    for name in path.split("."):
        found = found[name]
    return {name: value for name, value in found.items() if name != KIND}


def _unknown_kind(path: str, kind: str, known: Collection[str]) -> str:
    listed = f"known are {', '.join(sorted(known))}" if known else "none is known"
    return (
        f"{path}: unknown kind {kind!r}; {listed}. Is it of a class of your own? Import the module that "
        "registers it first, or make it a plug-in, which is imported by itself (CONTRIBUTING.md)"
    )


def load_config(path: Path, *, keeps_unknown_terms: bool = False) -> RunConfig:
    """The configuration saved in a run directory; `keeps_unknown_terms` as for `from_dict`.

    Raises:
        ConfigError: there is none, or it does not fit this version.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if is_beginning(path.parent):
            raise ConfigError(f"{path.parent}: {BEGINNING}") from None
        raise ConfigError(f"{path.parent} is no run directory: {_why_no_run(path)}") from None
    except NotADirectoryError:
        folder = path.parent.parent
        hint = f"; did you mean {folder}?" if (folder / path.name).is_file() else ""
        raise ConfigError(f"{path.parent} is a file and no run directory{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that there is not
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is damaged: it holds no mapping")
    return from_dict(data, keeps_unknown_terms=keeps_unknown_terms)


def _why_no_run(path: Path) -> str:
    if not path.parent.is_dir():
        return "there is no such directory"
    runs = sorted((p.parent.name for p in path.parent.glob(f"*/{path.name}")), key=lambda n: (len(n), n))
    if not runs:
        return f"it holds no {path.name}"
    listed = ", ".join(runs) if len(runs) <= 5 else f"{', '.join(runs[:3])}, …, {runs[-1]}"
    return f"it holds runs, {listed}: take one of them, e.g. {path.parent / runs[0]}"


def problems(config: RunConfig) -> list[Problem]:
    """Everything wrong with a configuration, with full keys."""
    return list(all_problems(config))


def differences(old: Section, new: Section) -> list[tuple[str, Any, Any]]:
    """Full keys whose values differ, with both values; a section of another kind is one difference."""
    found = []
    before, after = flat(to_dict(old)), flat(to_dict(new))
    for key in before | after:
        if before.get(key) != after.get(key):
            found.append((key, before.get(key), after.get(key)))
    return found


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by full key, as `train.lr`."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _kinds(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, dict):
            if KIND in value:
                yield f"{prefix}{key}", str(value[KIND])
            yield from _kinds(value, f"{prefix}{key}.")


def _declared(schema: Any, path: str) -> tuple[Any, ...]:
    """The types that a place of the configuration is declared with."""
    parent, _, name = path.rpartition(".")
    owner: Any = OmegaConf.get_type(OmegaConf.select(schema, parent)) if parent else RunConfig
    if owner is dict:  # an entry: the dictionary's own field says which kind of sections it holds
        return _declared(schema, parent)
    hint = typing.get_type_hints(owner).get(name)
    return (hint, *typing.get_args(hint))


def _texts(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain data, keys among them, with the full key it stands under."""
    if isinstance(data, str):
        yield key, data
    elif isinstance(data, list):
        for item in data:
            yield from _texts(item, key)
    elif isinstance(data, dict):
        for name, item in data.items():
            yield from _texts(name, key)
            yield from _texts(item, f"{key}.{name}" if key else str(name))


def _without_kinds(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_kinds(value) if isinstance(value, dict) else value
        for key, value in data.items()
        if key != KIND
    }


def sections(config: Section, prefix: str = "") -> Iterator[tuple[str, Section]]:
    """A section and all sections inside it, with their full keys."""
    yield prefix, config
    for key, child in children(config):
        yield from sections(child, f"{prefix}.{key}" if prefix else key)
