"""Where a new run begins: with what another run has learned, instead of with random values."""

import dataclasses
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
from spd_hydra.run_files import CONFIG
from spd_hydra.saved_config import differences, flat, load_config, to_dict
from spd_hydra.saved_run import MAY_CHANGE, TARGET_FILE, read_target, with_whole_paths
from spd_hydra.section import ConfigError
from spd_hydra.trainer import Trainer

_CHECKPOINTS = "checkpoints"
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
    replicas = sorted(run.glob(f"replica_*/{CONFIG}"))
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
    then, now = (flat(to_dict(with_whole_paths(of).model)) for of in (saved, config))
    changed = [
        f"  model.{key}: {then.get(key)} → {now.get(key)}"
        for key in then | now
        # A branch of a hub is pinned when the run begins; the weights are that run's own in any case.
        if then.get(key) != now.get(key) and not key.endswith("revision")
    ]
    if changed:
        raise ConfigError(
            f"start_from: the target is that of {origin.run}, so what describes it has to be the same:\n"
            + "\n".join(changed)
        )


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
    """The configuration with the checkpoint that `start_from` means now, by its whole path."""
    origin = origin_of(config)
    return config if origin is None else dataclasses.replace(config, start_from=str(origin.checkpoint))


def starting_target(config: RunConfig, device: torch.device) -> TrainedTarget | None:
    """The target of the run that this one begins with; None: it begins by itself.

    Raises:
        WeightsError, ConfigError: it cannot be had, see `read_target`.
    """
    origin = origin_of(config)
    if origin is None:
        return None
    try:
        return read_target(_saved(origin), origin.run, device)
    except FileNotFoundError:
        raise ConfigError(f"start_from: {origin.run} has no {TARGET_FILE}") from None


def begin_elsewhere(config: RunConfig, trainer: Trainer) -> None:
    """Save what `start_from` names as the run's first checkpoint: it never needs the other run again.

    Args:
        config: of the new run.
        trainer: at its beginning.

    Raises:
        ConfigError: the checkpoint to begin with is gone or damaged.
        CheckpointError: the new one could not be written.
    """
    origin = origin_of(config)
    assert origin is not None, "only where start_from is given"
    try:
        found = load_checkpoint(origin.checkpoint)
    except CheckpointError as error:
        raise ConfigError(f"start_from: {error}") from error
    step = 0 if config.start_anew else found.step
    moments = {} if config.start_anew else _of_this_loss(found.tensors["optimizer"], trainer)
    tensors = {"model": found.tensors["model"], "optimizer": moments}
    state = {"step": step, "facts": trainer.facts, "times": {}}
    run, keep = trainer.run, config.train.keep_checkpoints
    save_checkpoint(run.checkpoints, step, tensors, state, keep, run.require_ownership)
    others = _told_differences(_saved(origin), config)
    say(
        f"begins at step {step} with the subcomponents of {origin.checkpoint}"
        + (f"; other than there:\n{others}" if others else "")
    )


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
    untold = (*(key for key in MAY_CHANGE if key != "train.steps"), "start_", "name", "model.")
    changed = [
        f"  {key}: {old} → {new}"
        for key, old, new in differences(saved, config)
        if not key.startswith(untold)
    ]
    more = len(changed) - _MOST_DIFFERENCES
    return "\n".join(changed[:_MOST_DIFFERENCES] + ([f"  and {more} more"] if more > 0 else []))
