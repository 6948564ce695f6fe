"""One run from configuration to report: the only place that knows all the parts."""

import dataclasses
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from spd_hydra.analyse import analyse
from spd_hydra.build import Parts, assemble, device_of, obtain, preflight
from spd_hydra.checkpoint import load_newest
from spd_hydra.config import RunConfig, Task, differences, load_config, to_dict, to_yaml
from spd_hydra.environment import describe_environment
from spd_hydra.figure.base import draw_all
from spd_hydra.logger.base import Logger
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.model.obtain import TrainedTarget
from spd_hydra.redaction import redact
from spd_hydra.restarts import begin_with_best
from spd_hydra.result import Outcome, conclude, say, steps_per_second
from spd_hydra.run_dir import RunDirectory, Status
from spd_hydra.saved_run import TARGET_FILE, read_target, target_facts, write_target
from spd_hydra.section import ConfigError
from spd_hydra.trainer import Interrupted, Trainer, TrainingError

_MAY_CHANGE_ON_RESUME = (
    "train.steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.compile",
    "eval.",
    "logger",
    "out_dir",
    "cache_dir",
    "task",
    "run",
    "resume",
    "sweep",
    "objective",
    "allow_extra",
)


class RunError(RuntimeError):
    """The run failed for a reason that its message explains; no traceback is needed."""


def run(
    config: RunConfig,
    *,
    run_dir: Path | None = None,
    saved: RunConfig | None = None,
) -> Outcome:
    """Do what `config.task` says.

    Args:
        config: the whole configuration; for a resume, the saved one with the changes applied.
        run_dir: where to write, for a job of a sweep; None: a new folder below `out_dir`.
        saved: the configuration as it was saved, for a resume.

    Raises:
        ConfigError: the configuration cannot work; nothing was trained.
        RunError: training failed.
        KeyboardInterrupt: the user stopped it.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    if config.task is Task.check:
        return Outcome(None, check(config))
    if config.task is Task.analyse:
        return analyse(config)
    if config.resume is not None:
        return resume(config, saved)
    preflight(config)
    root = Path(config.out_dir).expanduser()
    with RunDirectory.create(root, config.name) if run_dir is None else RunDirectory.at(run_dir) as directory:
        directory.write_config(to_yaml(config))
        directory.write_environment(describe_environment(device_of(config).type))
        return _recorded(directory, lambda: _decompose(config, directory))


def resume(config: RunConfig, saved: RunConfig | None = None) -> Outcome:
    """Go on with a run that was stopped, from its newest whole checkpoint.

    Raises:
        ConfigError: the changes would make it another run, or one of fewer steps than are done.
    """
    assert config.resume is not None, "resume needs a directory"
    path = Path(config.resume)
    saved = saved if saved is not None else load_config(path / "config.yaml")
    changed = [
        (key, old, new)
        for key, old, new in differences(saved, config)
        if not key.startswith(_MAY_CHANGE_ON_RESUME)
    ]
    if changed:
        lines = "\n".join(f"  {key}: {old} → {new}" for key, old, new in changed)
        raise ConfigError(
            f"resume={path}: these changes would make it another run:\n{lines}\n"
            "Only train.steps, logging, evaluation and checkpoint keys may change; start a new run for others"
        )
    with RunDirectory.open(path) as directory:
        summary, status = directory.read_summary() or {}, directory.read_status() or {}
        steps = summary.get("steps", 0)
        if config.train.steps < saved.train.steps:
            _require_no_more_done(directory, config)
        if steps >= config.train.steps and status.get("status") == Status.done.value:
            say(f"{path} has finished its {steps} steps: nothing to do. Raise train.steps to go on")
            return Outcome(path, summary)
        config = dataclasses.replace(config, resume=None, task=saved.task)
        directory.write_config(to_yaml(config))
        directory.write_environment(describe_environment(device_of(config).type))
        return _recorded(directory, lambda: _decompose(config, directory))


def check(config: RunConfig) -> dict[str, Any]:
    """Build everything without training and say how large it is."""
    parts = preflight(config)
    trainable = sum(p.numel() for p in parts.model.parameters() if p.requires_grad)
    say(f"{config.name}: the configuration is sound")
    for site, shape in parts.model.site_shapes().items():
        say(f"  {site}: {parts.model.weight(site).shape[0]} x {shape.d_in}, C = {shape.C}")
    memory = trainable * 16 / 2**20
    say(f"  trainable parameters: {trainable:,} ({memory:.1f} MiB with gradients and AdamW's moments)")
    say(f"  loss terms: {', '.join(config.loss.active_terms())}")
    return {"experiment": config.name, "trainable_parameters": trainable}


def _decompose(config: RunConfig, directory: RunDirectory) -> Outcome:
    started = time.perf_counter()
    device = device_of(config)
    target = _target(config, directory, device)
    if config.task is Task.train_target:
        summary = {"experiment": config.name, "seed": config.seed, "target": target_facts(target)}
        directory.write_summary(summary)
        say(f"target {'certified' if target.certified else 'NOT certified'}: {directory.path / TARGET_FILE}")
        return Outcome(directory.path, summary)
    parts = assemble(config, target.module, device)
    tracker = config.logger.start(directory.path, config.name, redact(to_dict(config)))
    try:
        summary = _train(config, parts, target, directory, tracker, started)
    except BaseException:
        tracker.finish(None, 1)
        raise
    tracker.finish(summary, 0)
    return Outcome(directory.path, summary)


def _train(
    config: RunConfig,
    parts: Parts,
    target: TrainedTarget,
    directory: RunDirectory,
    tracker: Logger,
    started: float,
) -> dict[str, Any]:
    def draw(evaluation: Evaluation) -> None:
        drawn = draw_all(evaluation, directory.read_metrics(), directory.figures)
        tracker.log_figures(evaluation.step, {figure.name: figure.path for figure in drawn})

    trainer = Trainer(
        parts.objective,
        training=config.train,
        evaluation=config.eval,
        sampler=parts.train_sampler(),
        evaluate=lambda step: parts.evaluate(step, certified=target.certified),
        on_figures=draw,
        run=directory,
        tracker=tracker,
    )
    trainer.started, trainer.seconds = started, {"target": target.seconds} | trainer.seconds
    _restore(trainer, directory, config)
    evaluation = _fit(trainer, parts, directory)
    times = trainer.times()
    summary, drawn = conclude(
        directory,
        parts,
        target,
        evaluation,
        seconds=times["seconds"],
        steps_per_second=steps_per_second(times),
        restarts=trainer.facts.get("restarts"),
    )
    tracker.log_figures(evaluation.step, drawn)
    return summary


def _restore(trainer: Trainer, directory: RunDirectory, config: RunConfig) -> None:
    """Go on from the newest whole checkpoint, if there is one."""
    checkpoint = load_newest(directory.checkpoints)
    if checkpoint is None:
        directory.truncate_metrics(0)  # of an attempt that was killed before its first checkpoint
        return
    trainer.restore(checkpoint)
    say(f"going on from step {trainer.step}")


def _require_no_more_done(directory: RunDirectory, config: RunConfig) -> None:
    newest = load_newest(directory.checkpoints)
    if newest is not None and newest.step > config.train.steps:
        raise ConfigError(
            f"train.steps: got {config.train.steps}, but the run has done {newest.step}; "
            "a run cannot go back, start a new one"
        )


def _fit(trainer: Trainer, parts: Parts, directory: RunDirectory) -> Evaluation:
    hint = f"spd-run {shlex.quote(f'resume={directory.path}')}"
    try:
        if trainer.step == 0:
            begin_with_best(trainer, parts.initial_state)
        return trainer.fit()
    except TrainingError as error:
        raise RunError(str(error)) from error
    except Interrupted:
        say(f"saved at step {trainer.step}; go on with: {hint}")
        raise
    except KeyboardInterrupt:
        if any(directory.checkpoints.glob("step_*")):
            say(f"stopped without saving; go on from the newest checkpoint with: {hint}")
        else:
            say(f"stopped before anything was saved; begin again in the same directory with: {hint}")
        raise


def _target(config: RunConfig, directory: RunDirectory, device: torch.device) -> TrainedTarget:
    """The run's own target if it has one already, else from the cache, else trained now."""
    if (directory.path / TARGET_FILE).exists():
        return read_target(config, directory.path, device)
    target = obtain(config, device)
    write_target(target, directory.path)
    if target.certified and target.tries > 1 and not target.cached:
        say(f"target: {target.tries} seeds tried until one was fit to be decomposed")
    return target


def _recorded(directory: RunDirectory, work: Callable[[], Outcome]) -> Outcome:
    """Do the work of a run; its status file says how that went, whatever happens."""
    directory.write_status(Status.running, step=_last_step(directory))
    try:
        outcome = work()
    except BaseException as error:
        text = (
            "interrupted by the user"
            if isinstance(error, KeyboardInterrupt)
            else f"{type(error).__name__}: {error}"
        )
        directory.write_status(Status.failed, step=_last_step(directory), error=text)
        raise
    directory.write_status(Status.done, step=int(outcome.summary.get("steps", 0)))
    return outcome


def _last_step(directory: RunDirectory) -> int:
    rows = directory.read_metrics()
    return int(rows[-1]["step"]) if rows else 0
