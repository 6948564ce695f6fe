"""What a run directory holds, as objects again."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spd_hydra import distributed, rng
from spd_hydra.config import RunConfig
from spd_hydra.model.base import Measurement, TargetSpec
from spd_hydra.model.obtain import TrainedTarget
from spd_hydra.model.users_code import told_of
from spd_hydra.model.weights import (
    holds_weights,
    load_target_weights,
    require_same_weights,
    save_target,
    target_metadata,
    weights_digest,
)
from spd_hydra.saved_config import flat, to_dict
from spd_hydra.section import ConfigError
from spd_hydra.sources import may_move

TARGET_FILE = "target.safetensors"

NEEDS_NO_FILE = (
    "the run directory has the weights, so give the class a method skeleton(architecture) that makes the "
    "module without them, see docs/guide/python.md"
)

MAY_CHANGE = (
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.accumulate",
    "train.checkpoint_activations",
    "train.compile",  # and compile_blocks
    "train.cuda_graphs",
    "train.shard",
    "eval.",
    "logger",
    "out_dir",
    "cache_dir",
    "data.cache_dir",
    "task",
    "run",
    "resume",
    "sweep",
    "objective",
    "allow_extra",
    "threads",
    "device",
)
"""Keys, or how they begin, that may change in a resume: they touch what is trained by rounding at most."""

TOLD_MAY_CHANGE = (
    "train.steps, threads, device, train.accumulate, train.checkpoint_activations, train.shard, and keys of "
    "compiling, logging, evaluation and checkpoints, and of where model and text lie"
)


def require_trust(path: Path, config: RunConfig, *, trusted: bool, yes: str) -> None:
    """Refuse to run Python code that a saved configuration names, unless the user said so.

    Args:
        path: the run directory.
        config: as it was saved there.
        trusted: whether the user said so.
        yes: how that is said.

    Raises:
        ConfigError: names the code and says how to allow it.
    """
    code = config.model.foreign_code()
    if code is not None and not trusted:
        raise ConfigError(
            f"trust_remote_code: the target of {path} comes with Python code, which is not run unasked: "
            f"that of {code}; if you have read it and trust it, {yes}"
        )


def fixed(config: RunConfig) -> dict[str, Any]:
    """What of a configuration cannot change once a run has begun, by full key."""
    return {key: value for key, value in flat(to_dict(config)).items() if not key.startswith(MAY_CHANGE)}


def require_own_config(path: Path, config: RunConfig, state: Mapping[str, Any], checkpoint: str) -> None:
    """Refuse to go on, or to measure, with another configuration than that of the steps that were done.

    Args:
        path: the run directory.
        config: what its config.yaml says.
        state: what a checkpoint says beside its tensors.
        checkpoint: its name.

    Raises:
        ConfigError: config.yaml was changed or cut after the run began; names the keys.
    """
    now, trained = fixed(config), _fact(state, "config")
    changed = [
        f"  {key}: {old} → {now.get(key)}"
        for key, old in trained.items()
        if now.get(key) != old and not key.startswith((*MAY_CHANGE, *may_move(config)))
    ]
    if changed:
        raise ConfigError(
            f"{path / 'config.yaml'} was changed or cut since {checkpoint} was saved:\n"
            + "\n".join(changed)
            + "\nPut these back to go on, or start a new run"
        )


def require_same_data(now: Mapping[str, Any], state: Mapping[str, Any], checkpoint: str) -> None:
    """Refuse to go on with other text than that of the steps that were done, or to measure them on it.

    Args:
        now: digests of the rows by what they are for, as far as they are known.
        state: what a checkpoint says beside its tensors.
        checkpoint: its name.

    Raises:
        ConfigError: names what is different.
    """
    then = _fact(state, "data")
    changed = [what for what, digest in now.items() if then.get(what) not in {digest, None}]
    if changed:
        raise ConfigError(
            f"data: the rows to {' and to '.join(changed)} on are not those of {checkpoint}: the text was "
            "changed since; put it back, or start a new run"
        )


def target_digest(directory: Path) -> dict[str, Any]:
    """What tells the target in a run directory from others: kept in `facts` of a checkpoint."""
    return {"weights": weights_digest(directory / TARGET_FILE)}


def require_same_target(now: Mapping[str, Any], state: Mapping[str, Any], checkpoint: str) -> None:
    """Refuse to go on with another target than that of the steps that were done, or to measure them on it.

    Args:
        now: as `target_digest` gives it.
        state: what a checkpoint says beside its tensors.
        checkpoint: its name.

    Raises:
        ConfigError: it was replaced, or made again with other numbers.
    """
    then = _fact(state, "target").get("weights")
    if then not in {None, now.get("weights")}:
        raise ConfigError(
            f"{TARGET_FILE}: the target is not that of {checkpoint}: it was replaced, or made again on "
            "another machine or with other threads; put it back, or start a new run"
        )


def machine(device: str, *, replicas: int = 1) -> dict[str, Any]:
    """What rounding in a step depends on beside the configuration: kept in `facts` of a checkpoint.

    Args:
        device: the kind of device, as torch names it.
        replicas: decompositions that share the step.
    """
    ranks, threads = distributed.world_size(), torch.get_num_threads()
    return {"ranks": ranks, "threads": threads, "device": device, "replicas": replicas}


def was_alone(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint of a replica was saved by a run of this replica alone."""
    return _fact(state, "machine").get("replicas") == 1


def rounding_note(path: Path, now: Mapping[str, Any], state: Mapping[str, Any]) -> str | None:
    """What to say where a run goes on with steps that round otherwise than those that were done, else None.

    Args:
        path: the run directory.
        now: as `machine` gives it.
        state: what a checkpoint says beside its tensors.
    """
    before = _fact(state, "machine")
    differs = [key for key in now if before.get(key) not in (None, now[key])]
    if "ranks" in differs or before.get("device") == now["device"] != "cpu":
        differs = [key for key in differs if key != "threads"]  # a consequence, or without one
    if not differs:
        return None
    again = {
        "ranks": f"launcher.ranks_per_node={before.get('ranks')}",
        "threads": f"threads={before.get('threads')}",
        "device": f"device={before.get('device')}",
        "replicas": "all replicas together" if now["replicas"] == 1 else "each replica alone",
    }
    changes = ", ".join(f"{key}: {before[key]} → {now[key]}" for key in differs)
    return (
        f"{path} goes on with other {' and '.join(differs)} than before ({changes}): its numbers will differ "
        "in the last bits from those of a run that goes on with the same. The same: "
        f"{' '.join(again[key] for key in differs)}"
    )


def _fact(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    facts = state.get("facts")
    found = facts.get(name) if isinstance(facts, dict) else None
    return found if isinstance(found, dict) else {}


def target_facts(target: TrainedTarget) -> dict[str, Any]:
    """What a summary says of the target."""
    return {
        "certified": target.certified,
        "seed": target.seed,
        "tries": target.tries,
        "loss": target.loss,
        "cached": target.cached,
        "measurements": [dataclasses.asdict(measurement) for measurement in target.measurements],
    }


def write_target(spec: TargetSpec, target: TrainedTarget, directory: Path) -> None:
    """Keep the target in the run directory: its weights, or for a large one found elsewhere their digest."""
    metadata = {"facts": json.dumps(target_facts(target))}
    if (architecture := spec.architecture(target.module)) is not None:
        metadata["architecture"] = architecture
    keeps = spec.keeps_weights(target.module)
    save_target(target.module, directory / TARGET_FILE, metadata, only_digest=not keeps)


def read_target(config: RunConfig, directory: Path, device: torch.device) -> TrainedTarget:
    """The target that `write_target` kept, frozen and in evaluation mode.

    Raises:
        FileNotFoundError: the run was stopped before it had a target.
        WeightsError: the file is damaged, or the weights that are elsewhere are no longer the same.
        ConfigError: the weights are elsewhere and cannot be found there, or the target is of a class of the
            user's own that fails.
    """
    path = directory / TARGET_FILE
    metadata = target_metadata(path)
    facts = json.loads(metadata["facts"])
    if holds_weights(path):
        with told_of("model", config.model, "skeleton", NEEDS_NO_FILE):
            module = config.model.skeleton(metadata.get("architecture"))
        load_target_weights(module, path)
    else:
        with told_of("model", config.model, "build"):
            module = config.model.build(rng.generator(facts["seed"], "target_weights"))
        require_same_weights(module, path)
    measurements = [Measurement(**measurement) for measurement in facts.pop("measurements")]
    module = module.to(device).eval().requires_grad_(False)
    return TrainedTarget(module=module, measurements=measurements, seconds=0.0, **facts)
