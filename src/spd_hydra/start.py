"""Where a new run begins: with what another run has learned, instead of with random values."""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from spd_hydra.build import Parts
from spd_hydra.checkpoint import CheckpointError, load_checkpoint, require_whole, save_checkpoint, step_of
from spd_hydra.config import RunConfig
from spd_hydra.distributed import say
from spd_hydra.loss.persistent_recon import is_adversarys
from spd_hydra.model.obtain import TrainedTarget
from spd_hydra.run_dir import RunDirectory
from spd_hydra.run_files import CONFIG
from spd_hydra.saved_config import differences, flat, load_config, to_dict
from spd_hydra.saved_run import MAY_CHANGE, TARGET_FILE, read_target, require_same_target, target_digest
from spd_hydra.section import ConfigError
from spd_hydra.sources import MAY_MOVE, from_sources, is_commit, sources, with_whole_paths
from spd_hydra.trainer import Trainer

_CHECKPOINTS = "checkpoints"
_FETCHED = ".start"  # what a run begins with, in its directory until its first checkpoint is saved
_MOST_DIFFERENCES = 12


class Origin(NamedTuple):
    """A checkpoint that another run begins with."""

    run: Path
    checkpoint: Path

    @property
    def step(self) -> int:
        """The steps that it has seen."""
        return step_of(self.checkpoint)


def origin_of(config: RunConfig) -> Origin | None:
    """The checkpoint that `start_from` names, or the newest whole one of the run that it names.

    Raises:
        ConfigError: there is none.
    """
    if config.start_from is None:
        return None
    given = Path(config.start_from).expanduser().absolute()
    if given.parent.name == _CHECKPOINTS and (given.parent.parent / CONFIG).is_file():
        run, checkpoint = given.parent.parent, given
        if not checkpoint.is_dir():
            raise ConfigError(f"start_from: {given} does not exist; {run} has {_listed(run)}")
    elif (given / CONFIG).is_file():
        run = given
        try:
            newest = require_whole(run / _CHECKPOINTS)
        except CheckpointError as error:
            raise ConfigError(f"start_from: {error}") from error
        if newest is None:
            raise ConfigError(f"start_from: {run} has no checkpoint{_replicas(run)}")
        checkpoint = newest
    else:
        raise ConfigError(
            f"start_from: got {config.start_from}, must be the directory of a run or one of its checkpoints, "
            "e.g. outputs/tms_5-2/<time>_<id>/checkpoints/step_<n>"
        )
    return Origin(run, checkpoint)


def _listed(run: Path) -> str:
    names = sorted((path.name for path in (run / _CHECKPOINTS).glob("step_*")), key=lambda n: (len(n), n))
    return ", ".join(names) or "no checkpoint"


def _replicas(run: Path) -> str:
    replicas = sorted(run.glob(f"[0-9]*/{CONFIG}"))
    return f"; take one of its replicas, e.g. {replicas[0].parent}" if replicas else ""


def require_fit(config: RunConfig, parts: Parts) -> None:
    """Refuse a start that this run cannot begin with, before anything is made.

    Raises:
        ConfigError: the other run has another target, other sites, shapes or kinds of causal-importance
            functions, or is as far as this one is to go.
    """
    origin = origin_of(config)
    if origin is None:
        return
    saved = _saved(origin)
    _require_same_target(origin, saved, config)
    _require_same_shapes(origin, parts)
    if not config.start_anew and origin.step >= config.train.steps:
        raise ConfigError(
            f"train.steps: got {config.train.steps}, but {origin.checkpoint} has done {origin.step}; give "
            "more, or start_anew=true to take its parameters alone and begin at step 0"
        )


def _saved(origin: Origin) -> RunConfig:
    try:
        return load_config(origin.run / CONFIG)
    except ConfigError as error:
        raise ConfigError(f"start_from: {error}") from error


def _require_same_target(origin: Origin, saved: RunConfig, config: RunConfig) -> None:
    then, now = (flat(to_dict(of.model)) for of in (saved, config))
    changed = [
        f"  model.{key}: {then.get(key)} → {now.get(key)}"
        for key in then | now
        if then.get(key) != now.get(key) and f"model.{key}" not in MAY_MOVE
    ]
    revision = now.get("revision")
    if is_commit(revision) and _same_name(saved, config) and revision != then.get("revision"):
        changed.append(f"  model.revision: {then.get('revision')} → {revision}")
    if changed:
        raise ConfigError(
            f"start_from: the target is that of {origin.run}, so what describes it has to be the same:\n"
            + "\n".join(changed)
        )


def _same_name(saved: RunConfig, config: RunConfig) -> bool:
    return with_whole_paths(saved).model.names() == with_whole_paths(config).model.names()


def _require_same_shapes(origin: Origin, parts: Parts) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in parts.model.trainable_state().items()}
    found = _shapes(origin.checkpoint)
    wrong = [
        f"  {name}: {found.get(name, 'none')} there, {wanted.get(name, 'none')} here"
        for name in found | wanted
        if found.get(name) != wanted.get(name)
    ]
    if wrong:
        more = [f"  and {len(wrong) - _MOST_DIFFERENCES} more"] if len(wrong) > _MOST_DIFFERENCES else []
        raise ConfigError(
            f"start_from: {origin.checkpoint} does not fit decomposition and ci_fn:\n"
            + "\n".join(wrong[:_MOST_DIFFERENCES] + more)
        )


def _shapes(checkpoint: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the trained parameters, without their values."""
    path = checkpoint / "model.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"start_from: {path} cannot be read: {error}") from error


def pinned_start(config: RunConfig) -> RunConfig:
    """The configuration with what `start_from` means now: the checkpoint, and the commit of its target."""
    origin = origin_of(config)
    if origin is None:
        return config
    saved = _saved(origin)
    if type(saved.model) is type(config.model) and _same_name(saved, config):
        revision = sources(saved)["model"].get("revision")
        config = config if revision is None else from_sources(config, {"model": {"revision": revision}})
    return dataclasses.replace(config, start_from=str(origin.checkpoint))


def require_whole_start(config: RunConfig) -> None:
    """Read the checkpoint that a new run begins with, before anything is made.

    Raises:
        ConfigError: it is gone or damaged, or its run has another target now.
    """
    origin = origin_of(config)
    if origin is None:
        return
    try:
        found = load_checkpoint(origin.checkpoint)
        require_same_target(target_digest(origin.run), found.state, str(origin.checkpoint))
    except (CheckpointError, FileNotFoundError) as error:
        raise ConfigError(f"start_from: {error}") from error


def fetch_start(config: RunConfig, directory: RunDirectory) -> None:
    """Copy what a new run begins with into its directory: the other run goes on, and removes checkpoints.

    Raises:
        RunDirectoryError: nothing could be written.
    """
    place, unfinished = directory.path / _FETCHED, directory.path / f"{_FETCHED}_unfinished"
    with directory.errors("write", _FETCHED):
        for path in (place, unfinished):  # of a begin that was killed
            shutil.rmtree(path, ignore_errors=True)
        origin = origin_of(config)
        if origin is None:
            return
        unfinished.mkdir()
        for name in (CONFIG, TARGET_FILE):
            shutil.copyfile(origin.run / name, unfinished / name)
        shutil.copytree(origin.checkpoint, unfinished / _CHECKPOINTS / origin.checkpoint.name)
        unfinished.rename(place)


def _fetched(directory: RunDirectory) -> Origin | None:
    place = directory.path / _FETCHED
    if not (place / CONFIG).is_file():
        return None
    (checkpoint,) = (place / _CHECKPOINTS).iterdir()
    return Origin(place, checkpoint)


def starting_target(config: RunConfig, directory: RunDirectory, device: torch.device) -> TrainedTarget | None:
    """The target of the run that this one begins with; None: it begins by itself.

    Raises:
        WeightsError, ConfigError: it cannot be had, see `read_target`.
    """
    origin = _fetched(directory)
    return None if origin is None else read_target(config, origin.run, device)


def begin_elsewhere(config: RunConfig, trainer: Trainer) -> bool:
    """Save what was fetched as the run's first checkpoint.

    Args:
        config: of the new run.
        trainer: at its beginning.

    Returns:
        Whether there was anything: else the run begins by itself.

    Raises:
        CheckpointError: it is damaged, or the new one could not be written.
    """
    run = trainer.run
    origin = _fetched(run)
    if origin is None:
        return False
    found = load_checkpoint(origin.checkpoint)
    step = 0 if config.start_anew else found.step
    moments = {} if config.start_anew else _of_this_loss(found.tensors["optimizer"], trainer)
    tensors = {"model": found.tensors["model"], "optimizer": moments}
    state = {"step": step, "facts": trainer.facts, "times": {}}
    keep = config.train.keep_checkpoints
    save_checkpoint(run.checkpoints, step, tensors, state, keep, run.require_ownership)
    others = _told_differences(_saved(origin), config)
    say(
        f"begins at step {step} with the subcomponents of {config.start_from}"
        + (f"; other than there:\n{others}" if others else "")
    )
    return True


def forget_start(directory: RunDirectory) -> None:
    """Remove what was fetched, once the run has a checkpoint of its own."""
    shutil.rmtree(directory.path / _FETCHED, ignore_errors=True)


def _of_this_loss(moments: Mapping[str, Tensor], trainer: Trainer) -> dict[str, Tensor]:
    """The optimiser's state, with that of lasting adversaries if the loss has the same ones."""
    then, now = (
        {name: tensor.shape for name, tensor in of.items() if is_adversarys(name)}
        for of in (moments, trainer.adversary.state())
    )
    fit = all(then.get(name) == shape for name, shape in now.items())
    return {name: tensor for name, tensor in moments.items() if fit or not is_adversarys(name)}


def _told_differences(saved: RunConfig, config: RunConfig) -> str:
    """What the run does otherwise than the one that it begins with, a line each."""
    # A start has neither a warmup nor a choice among initialisations.
    skipped = ("start_", "name", "model.", "train.restarts.", "train.faithfulness_warmup.")
    untold = (*(key for key in MAY_CHANGE if key != "train.steps"), *skipped)
    changed = [
        f"  {key}: {old} → {new}"
        for key, old, new in differences(saved, config)
        if not key.startswith(untold)
    ]
    more = len(changed) - _MOST_DIFFERENCES
    return "\n".join(changed[:_MOST_DIFFERENCES] + ([f"  and {more} more"] if more > 0 else []))
