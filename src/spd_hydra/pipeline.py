"""The way of a run from its target to its report, on every rank."""

import dataclasses
import time
from typing import Any

import torch

from spd_hydra import competition, distributed
from spd_hydra.build import Parts, assemble, device_of, obtain
from spd_hydra.checkpoint import load_checkpoint, load_newest
from spd_hydra.config import RunConfig, Task
from spd_hydra.data.tokens import Tokens
from spd_hydra.decomposition.fitting import passed_over_notes
from spd_hydra.decomposition.left_out import left_out
from spd_hydra.distributed import say
from spd_hydra.estimate import Estimate, estimate
from spd_hydra.expectations import expectations
from spd_hydra.figure.base import draw_all
from spd_hydra.finite import TrainingError
from spd_hydra.logger.base import Logger
from spd_hydra.logger.trackers import Trackers
from spd_hydra.loss.divergence import Divergence
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.model.hf import AutoClass, HuggingFace
from spd_hydra.model.obtain import TrainedTarget, out_of_bounds
from spd_hydra.precision import Precision, products_in
from spd_hydra.preflight import preflight
from spd_hydra.rank_errors import RunError
from spd_hydra.redaction import redact
from spd_hydra.replicas import Alone
from spd_hydra.restarts import begin_with_best
from spd_hydra.result import Outcome, conclude, steps_per_second
from spd_hydra.run_dir import RunDirectory
from spd_hydra.saved_config import to_dict, to_yaml
from spd_hydra.saved_run import (
    TARGET_FILE,
    fixed,
    machine,
    read_target,
    require_same_data,
    require_same_target,
    target_digest,
    target_facts,
    write_target,
)
from spd_hydra.section import ConfigError
from spd_hydra.start import begin_elsewhere, forget_start, starting_target
from spd_hydra.stop import StopSignals
from spd_hydra.trainer import Trainer


def check(config: RunConfig) -> dict[str, Any]:
    """Build everything without training and say how large it is and what a step takes."""
    parts = preflight(config)
    try:
        found: Estimate | str = estimate(config, parts)
    except ConfigError:  # of data that were not read before
        raise
    except Exception as error:  # of a target that cannot be run without values
        found = str(error).partition(chr(10))[0]
    say(f"{config.name}: the configuration is sound")
    for site, shape in parts.model.site_shapes().items():
        say(f"  {site}: {parts.model.weight(site).shape[0]} x {shape.d_in}, C = {shape.C}")
    for line in (*remarks(parts), *config.data.notes()):
        say(f"  {line}")
    say(f"  loss terms: {', '.join(config.loss.active_terms())}")
    if isinstance(found, str):
        say(f"  what a step takes is not known: {found}")
        return {"experiment": config.name}
    for line in found.lines():
        say(f"  {line}")
    return {"experiment": config.name, **found.facts()}


def remarks(parts: Parts) -> list[str]:
    """What is allowed and may not be meant, a line each."""
    config, model = parts.config, parts.model
    found = passed_over_notes(model.passed_over)
    layers = [*model.matrix_names, *model.passed_over]
    if without := left_out(model.target, config.decomposition.sites, layers):
        found.append(without)
    if config.loss.divergence is Divergence.kl and not config.model.gives_logits():
        found.append(
            "loss.divergence: kl takes the softmax of the target's output, which is not known to be logits; "
            "of hidden units take mse"
        )
    if config.train.precision is Precision.tf32 and device_of(config).type != "cuda":
        found.append("train.precision: tf32 is for GPUs; on a CPU it is the same as fp32")
    if cut := _cut_texts(config):
        found.append(cut)
    return [*found, *expectations(parts)]


def _cut_texts(config: RunConfig) -> str | None:
    """What to say where a head that answers for a whole text gets rows cut from texts that were joined."""
    model, data = config.model, config.data
    if not (isinstance(model, HuggingFace) and isinstance(data, Tokens) and data.pack):
        return None
    if model.auto_class not in {AutoClass.sequence_classification, AutoClass.question_answering}:
        return None
    return (
        f"data.pack: true joins texts and cuts them into rows, but model.auto_class={model.auto_class.name} "
        "answers for a whole text, as of BERT by its first token; data.pack=false takes one text per row"
    )


def decompose(
    config: RunConfig, directory: RunDirectory, signals: StopSignals, trackers: Trackers
) -> Outcome:
    """Obtain the target, train its decomposition, and leave the result in the run directory.

    What it is tracked with is among `trackers`, to be ended by who calls this.

    Raises:
        RunError: training failed.
        Stopped: a signal asked for it.
    """
    if config.task is Task.train_target:
        return _only_target(config, directory)
    work = prepare(config, directory, signals, trackers, time.perf_counter())
    with products_in(config.train.precision):  # not of the target's own training, which others share
        _restore(config, work.trainer, directory)
        directory.write_config(to_yaml(config))  # whose model and text are now known to be those of the run
        summary = work.conclude(_fit(work.trainer, work.parts))
    trackers.succeeded(work.tracker, summary)
    return Outcome(directory.path, summary)


def _only_target(config: RunConfig, directory: RunDirectory) -> Outcome:
    target = _target(config, directory, device_of(config))
    summary = {"experiment": config.name, "seed": config.seed, "target": target_facts(target)}
    directory.write_summary(summary)
    certified = "certified" if target.certified else f"NOT certified ({out_of_bounds(target.measurements)})"
    say(f"target {certified}: {directory.path / TARGET_FILE}")
    return Outcome(directory.path, summary)


@dataclasses.dataclass(frozen=True)
class Work:
    """A decomposition with its target, and what it logs and leaves behind."""

    parts: Parts
    target: TrainedTarget
    directory: RunDirectory
    tracker: Logger
    trainer: Trainer

    def conclude(self, evaluation: Evaluation, *, replicas: int = 1) -> dict[str, Any]:
        """Write figures, summary and report; of several replicas the verdict is told by their table."""
        if self.directory.follows:
            return {}
        times = self.trainer.stopwatch.state()
        summary, drawn = conclude(
            self.directory,
            self.parts,
            self.target,
            evaluation,
            seconds=times["seconds"],
            steps_per_second=steps_per_second(times),
            restarts=self.trainer.facts.get("restarts"),
            replicas=replicas,
            tell=replicas == 1,
        )
        self.tracker.log_figures(evaluation.step, drawn)
        return summary


def prepare(
    config: RunConfig, directory: RunDirectory, signals: StopSignals, trackers: Trackers, started: float
) -> Work:
    """Everything of a decomposition up to its first step: target, parts, logger, trainer.

    Args:
        config: of one decomposition.
        directory: where it writes.
        signals: say when to stop.
        trackers: get the one that is begun here.
        started: when the run began, by `time.perf_counter`.
    """
    device = device_of(config)
    target = _target(config, directory, device)
    parts = assemble(config, target.module, device)
    tracker = (
        Logger()
        if directory.follows
        else config.logger.start(directory.path, config.name, redact(to_dict(config)))
    )
    trackers.begun(tracker)

    def draw(evaluation: Evaluation) -> None:
        if directory.follows:
            return
        history, allowed = directory.read_metrics(), directory.require_ownership
        drawn = draw_all(evaluation, history, directory.figures, allowed)
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
        signals=signals,
    )
    trainer.facts["config"] = fixed(config)
    trainer.facts["data"] = parts.content()
    trainer.facts["target"] = target_digest(directory.path)
    trainer.facts["machine"] = machine(device.type)
    watch = trainer.stopwatch
    watch.started, watch.seconds = started, {"target": target.seconds} | watch.seconds
    return Work(parts, target, directory, tracker, trainer)


def _restore(config: RunConfig, trainer: Trainer, directory: RunDirectory) -> None:
    """Go on from the newest whole checkpoint, if there is one; the others from the one that rank 0 found."""
    begins = False
    if directory.follows:
        name = distributed.of_rank_0()
        checkpoint = None if name is None else load_checkpoint(directory.checkpoints / name)
    else:
        checkpoint = load_newest(directory.checkpoints)
        begins = checkpoint is None and begin_elsewhere(config, trainer)
        if begins:
            checkpoint = load_newest(directory.checkpoints)
        if checkpoint is not None:
            forget_start(directory)
        distributed.of_rank_0(None if checkpoint is None else checkpoint.path.name)
    if checkpoint is None:
        directory.truncate_metrics(0)  # of an attempt that was killed before its first checkpoint
        return
    require_same_data(trainer.facts["data"], checkpoint.state, checkpoint.path.name)
    require_same_target(trainer.facts["target"], checkpoint.state, checkpoint.path.name)
    trainer.restore(checkpoint)
    if not begins:  # which it has said
        say(f"going on from step {trainer.step}")


def _fit(trainer: Trainer, parts: Parts) -> Evaluation:
    try:
        chooses = trainer.step == 0 and parts.config.start_from is None
        if chooses and (error := begin_with_best(Alone(trainer), [parts.initial_state])[0]):
            raise error
        competition.remove(trainer.run)  # killed between the checkpoint of the one chosen and this
        return trainer.fit()
    except TrainingError as error:
        raise RunError(str(error)) from error


def _target(config: RunConfig, directory: RunDirectory, device: torch.device) -> TrainedTarget:
    """The run's target: rank 0 sees to it that there is one, the others read it."""
    if directory.follows:
        distributed.of_rank_0()
        return read_target(config, directory.path, device)
    target = _own_target(config, directory, device)
    distributed.of_rank_0("the target is in the run directory")
    return target


def _own_target(config: RunConfig, directory: RunDirectory, device: torch.device) -> TrainedTarget:
    """The run's own target if it has one already, else from the cache, else trained now."""
    if (directory.path / TARGET_FILE).exists():
        return read_target(config, directory.path, device)
    target = starting_target(config, directory, device) or obtain(config, device)
    with directory.writing(TARGET_FILE) as path:
        write_target(config.model, target, path.parent)
    if target.certified and target.tries > 1 and not target.cached:
        say(f"target: {target.tries} seeds tried until one was fit to be decomposed")
    return target
