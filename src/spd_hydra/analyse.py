"""`task=analyse`: a finished or stopped run measured again."""

import dataclasses
from pathlib import Path
from typing import Any

from spd_hydra.build import assemble, device_of
from spd_hydra.checkpoint import Checkpoint, load_newest
from spd_hydra.command_word import command_word
from spd_hydra.config import RunConfig
from spd_hydra.precision import products_in
from spd_hydra.result import Outcome, conclude, steps_per_second
from spd_hydra.run_dir import RunDirectory
from spd_hydra.saved_config import differences, load_config, to_yaml
from spd_hydra.saved_run import (
    read_target,
    require_own_config,
    require_same_data,
    require_same_target,
    require_trust,
    target_digest,
)
from spd_hydra.section import ConfigError
from spd_hydra.sources import may_move

_MAY_DIFFER = ("task", "run", "eval.", "device", "threads")


def analyse(config: RunConfig) -> Outcome:
    """Measure the newest checkpoint of a run: metrics, figures, report and summary, into its directory.

    They take the place of what was measured of that step before.

    Args:
        config: the run's saved configuration, with `task` and `run`; `eval`, the device and the number of
            threads may be others.

    Raises:
        ConfigError: the directory is none of a run, it holds no checkpoint, its model has code of its own
            that was not allowed, or the configuration or the text is another one.
    """
    assert config.run is not None, "checked with the configuration"
    path = Path(config.run)
    try:
        saved = load_config(path / "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"run: {error}") from error
    require_single(path, saved)
    require_trust(path, saved, trusted=config.trust_remote_code, yes="add trust_remote_code=true")
    _require_same(path, saved, config)
    with RunDirectory.open(path) as directory:
        checkpoint = load_newest(directory.checkpoints)
        if checkpoint is None:
            raise ConfigError(f"run: {path} holds no checkpoint yet, so there is nothing to analyse")
        before = directory.read_summary() or {}
        require_own_config(path, saved, checkpoint.state, checkpoint.path.name)
        _require_newest(path, checkpoint, before)
        device = device_of(config)
        target = read_target(config, directory.path, device)
        parts = assemble(config, target.module, device, untrained=False)
        require_same_data(parts.content(), checkpoint.state, checkpoint.path.name)
        require_same_target(target_digest(directory.path), checkpoint.state, checkpoint.path.name)
        parts.model.load_trainable_state(checkpoint.tensors["model"])
        parts.objective.adversary.set_state(checkpoint.tensors["optimizer"])
        seconds, speed = _times(checkpoint, before)
        with products_in(config.train.precision):
            measured = parts.evaluate(checkpoint.step, certified=target.certified, last=True)
        if checkpoint.step >= saved.train.steps:  # a run that may go on keeps its own
            directory.write_config(to_yaml(dataclasses.replace(saved, eval=config.eval)))
            directory.replace_metrics(checkpoint.step, "eval", measured.row())
        summary, _ = conclude(
            directory,
            parts,
            target,
            measured,
            seconds=seconds,
            steps_per_second=speed,
            restarts=checkpoint.state["facts"].get("restarts"),
            replicas=before.get("replicas", 1),
        )
        return Outcome(path, summary)


def _require_newest(path: Path, checkpoint: Checkpoint, summary: dict[str, Any]) -> None:
    """Keep results from being replaced by those of an earlier step."""
    steps = summary.get("steps")
    if isinstance(steps, int) and checkpoint.step < steps:
        raise ConfigError(
            f"run: the newest whole checkpoint of {path} is of step {checkpoint.step}; its summary, which "
            f"would be lost, is of step {steps}. Go on from the checkpoint instead: spd-run "
            f"{command_word('resume', path)}"
        )


def _require_same(path: Path, saved: RunConfig, config: RunConfig) -> None:
    changed = [
        f"  {key}: {old} → {new}"
        for key, old, new in differences(saved, config)
        if not key.startswith((*_MAY_DIFFER, *may_move(saved)))
    ]
    if changed:
        raise ConfigError(
            f"run={path}: it was not done with these settings:\n" + "\n".join(changed) + "\n"
            "Only eval, device and threads may be others than in its config.yaml"
        )


def require_single(path: Path, config: RunConfig) -> None:
    """Refuse the directory of several replicas where one run is meant.

    Raises:
        ConfigError: says where the runs are.
    """
    if config.train.replicas > 1:
        raise ConfigError(
            f"run: {path} holds {config.train.replicas} replicas, each of them a run: "
            f"take {path / '0'} … {path / str(config.train.replicas - 1)}"
        )


def _times(checkpoint: Checkpoint, summary: dict[str, Any]) -> tuple[dict[str, float], float | None]:
    """Seconds and speed: of the summary, which counts the end of the run too, if it is of the same step."""
    if summary.get("steps") == checkpoint.step:
        return summary.get("seconds", {}), summary.get("steps_per_second")
    times = checkpoint.state.get("times")
    return (times["seconds"], steps_per_second(times)) if times else ({}, None)
