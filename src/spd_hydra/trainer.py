"""The training loop: what happens in a run, top to bottom."""

import logging
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from typing import Any

from torch import Tensor

from spd_hydra.accumulation import AccumulatedStep
from spd_hydra.checkpoint import Checkpoint, save_checkpoint
from spd_hydra.compiling import can_compile
from spd_hydra.decomposition.compiled_blocks import CompiledBlocks
from spd_hydra.decomposition.joining import join, told
from spd_hydra.finite import (
    require_finite,
    require_finite_evaluation,
    require_finite_weights,
    what_to_try,
)
from spd_hydra.graph import GraphedStep, graphed_step
from spd_hydra.logger.base import Logger
from spd_hydra.loss.objective import Objective, StepLoss
from spd_hydra.loss.persistent_recon import is_adversarys
from spd_hydra.metric.evaluation import Evaluation as EvaluationResult
from spd_hydra.optimizer import set_lr
from spd_hydra.progress import Progress
from spd_hydra.run_dir import RunDirectory, Status
from spd_hydra.sampler import Sampler, SplitSampler
from spd_hydra.step import Ascent, Step
from spd_hydra.stop import StopSignals, kept_from_children
from spd_hydra.stopwatch import Stopwatch
from spd_hydra.trainer_config import Evaluation, Training
from spd_hydra.updates import Updates

logger = logging.getLogger(__name__)

_JOINED_BY = 2**14  # rows by which it is judged what belongs together: a feature on in 1 % is on in 160
_MOST_BLOCK_RUNS = 32  # in a step that is compiled as a whole, which takes seconds for each of them


class Trainer:
    """Trains subcomponents and causal-importance function of one decomposition; ranks do the same steps.

    Args:
        objective: the loss and the model.
        training: optimiser, schedule, checkpoints.
        evaluation: when to measure.
        sampler: training batches and random numbers by step.
        evaluate: measures the model after a number of steps.
        on_figures: called with an evaluation whose figures are due.
        run: receives metrics and checkpoints.
        tracker: receives metrics too.
        signals: says when to stop.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        training: Training,
        evaluation: Evaluation,
        sampler: Sampler,
        evaluate: Callable[[int], EvaluationResult],
        on_figures: Callable[[EvaluationResult], None],
        run: RunDirectory,
        tracker: Logger,
        signals: StopSignals | None = None,
    ) -> None:
        self.objective, self.model = objective, objective.model
        self.training, self.evaluation = training, evaluation
        self.sampler, self.evaluate, self.on_figures = sampler, evaluate, on_figures
        self.run, self.tracker = run, tracker
        self.signals = StopSignals() if signals is None else signals
        self.step = 0
        self.stopwatch = Stopwatch()
        self.facts: dict[str, Any] = {}
        self.updates = Updates(self.model, training)
        self._is_on_cpu = self.model.device.type == "cpu"
        compile = training.compile and can_compile(self.model.device.type)
        self._is_to_be_compiled = compile  # by the first step
        if compile and compiles_blocks(objective, training):
            self.model.compiled_blocks, compile = CompiledBlocks(), False
        self.loss_and_gradients = Step(objective, compile=compile, pieces=self.updates.shards)
        self.accumulated: AccumulatedStep | None = None
        if training.accumulate > 1:
            split = SplitSampler(sampler, training.accumulate)
            self.accumulated = AccumulatedStep(objective, split, compile=compile, pieces=self.updates.shards)
        self.adversary = objective.adversary
        self.adversary_gradients = Ascent(objective, compile=compile)
        self._is_prepared = self._is_restored = False
        self._graph: GraphedStep | None = None
        self.lr = training.lr  # of the last step
        self.gradient_norms: dict[str, Tensor] = {}

    def fit(self) -> EvaluationResult:
        """Train to the last step and return the last evaluation.

        Raises:
            TrainingError: the loss or its gradient is no longer finite.
            Stopped: a signal asked for it; a checkpoint was saved.
        """
        if self.step == 0 and not self._is_restored:
            self.updates.fit_weights()
        self.take_from_rank_0()
        result = None
        progress = Progress(self.training.steps, self.step, disable=self.run.follows)
        with self.signals.stepping(), progress:
            while self.step < self.training.steps:
                loss = self.train_step()
                progress.update(self.step, lambda loss=loss: loss.summary())  # type: ignore[misc]
                result = self.record(loss)
                if self.step < self.training.steps:
                    self.stop_if_asked()
        # A run that was stopped after its last checkpoint has logged this evaluation already.
        return result if result is not None else self.evaluate(self.step)

    def record(self, loss: StepLoss) -> EvaluationResult | None:
        """After a step: log, measure and save where that is due; what was measured, if it was.

        Raises:
            TrainingError: what would be measured or saved, or was measured, is not finite.
        """
        result = None
        if self.is_due(self.training.log_every):
            self.log("train", self.numbers_of(loss))
        if self.is_due(self.evaluation.every) or self.is_due(self.training.checkpoint_every):
            self._require_finite_weights()  # the loss was looked at before they were changed
        if self.is_due(self.evaluation.every):
            result = self._evaluate()
        if self.is_due(self.training.checkpoint_every):
            self.save()
        return result

    def set_state(self, parameters: dict[str, Tensor], optimizer: dict[str, Tensor], *, step: int) -> None:
        """Go on from a step with these parameters, optimiser moments and adversaries (none: new ones).

        Moments are whole, or the pieces that `state` gave.
        """
        self.model.load_trainable_state(parameters)
        self.adversary.set_state(optimizer)
        moments = {name: value for name, value in optimizer.items() if not is_adversarys(name)}
        self.updates.set_moments(moments, in_place=self._graph is not None)
        self.step = step

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters, and moments with adversaries, as `set_state` takes them; training changes them.

        Of moments that are shared out, this rank's pieces.
        """
        return self.model.trainable_state(), self.updates.moments() | self.adversary.state()

    def take_from_rank_0(self) -> None:
        """Go on from what rank 0 has: on another kind of machine it may differ a little."""
        own = self.model.trainable_state() | self.adversary.state()
        self.updates.take_from_rank_0(list(own.values()))

    def stop_if_asked(self) -> None:
        """At the end of a step, where all is whole: if any rank is asked to, save and end.

        Raises:
            Stopped: it was asked to.
            TrainingError: what would be saved is not finite.
        """
        stopped = self.signals.agreed()
        if stopped is None:
            return
        self.save_whole()
        stopped.step = self.step
        raise stopped

    def save_whole(self) -> None:
        """Write a checkpoint at a step that was not meant to have one.

        Raises:
            TrainingError: what would be saved is not finite.
        """
        self._require_finite_weights()
        self.save()

    def train_step(self) -> StepLoss:
        """One step: draw, schedule, loss, gradients, update."""
        # A signal that is sent to all processes would end the C++ compiler, and with it the run.
        alone = kept_from_children() if self._is_to_be_compiled else nullcontext()
        with self.stopwatch.counting("compile" if self._is_to_be_compiled else "train"), alone:
            loss = self._train_step()
        self.stopwatch.steps += not self._is_to_be_compiled
        self._is_to_be_compiled = False
        return loss

    def join_if_due(self) -> None:
        """Let one subcomponent do the work of two, where that is due; all ranks see the same rows."""
        every = max(1, round(self.training.join_every * self.training.steps))
        if not self.training.join_every or self.step % every or self.step == self.training.steps:
            return
        found = join(self.model, self.sampler.others("join", self.step, _JOINED_BY))
        self.take_from_rank_0()  # a threshold makes much of a little difference
        if found:
            logger.info("step %d: joined %s", self.step, told(found))

    def _train_step(self) -> StepLoss:
        if not self._is_prepared:
            self._prepare()
        self.lr = self.training.lr * self.training.lr_schedule.factor(self.step, self.training.steps)
        loss = self._loss_and_gradients()
        # Before this step is logged, measured or saved. Norms take as long as a third of a toy's step, and
        # reading the loss waits for the device, which is free on a CPU.
        recorded = self.is_recorded(self.step + 1)
        self.gradient_norms = self.updates.norms() if recorded else {}
        if recorded or self._is_on_cpu:
            self.require_finite(loss)
        if self._graph is None:
            self._update()
        else:
            self._graph.update()
        self.step += 1
        self.join_if_due()
        return loss

    def _prepare(self) -> None:
        """What the first step needs."""
        if self._is_to_be_compiled:
            what = "training step" if self.model.compiled_blocks is None else "blocks of the target"
            logger.info("compiling the %s", what)
        self._graph = graphed_step(
            self.training.cuda_graphs and self.accumulated is None,
            sampler=self.sampler,
            step=self.loss_and_gradients,
            objective=self.objective,
            optimizer=self.updates.optimizer,
            update=self._update,
        )
        self._is_prepared = True

    def _loss_and_gradients(self) -> StepLoss:
        progress = self.step / self.training.steps
        if self._graph is not None:
            return self._graph.gradients(self.step, lr=self.lr, progress=progress)
        set_lr(self.updates.optimizer, self.lr)
        if (accumulated := self.accumulated) is not None:
            self._ascend(lambda: accumulated.parts(self.step))
            return accumulated(self.step, self.objective.scheduled(progress))
        batch, draws = self.sampler(self.step)
        self._ascend(lambda: [(batch, draws)])
        return self.loss_and_gradients(batch, draws, self.objective.scheduled(progress))

    def _ascend(self, parts: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
        """Let lasting adversaries climb before the step, with passes of their own over its batch."""
        for left in range(self.adversary.extra_ascents, 0, -1):
            self.adversary_gradients(parts())
            self.adversary.ascend(left)

    def _update(self) -> None:
        self.updates.step()
        self.adversary.ascend()

    def save(self) -> None:
        """Write a checkpoint of this step, from which all ranks go on."""
        self.take_from_rank_0()
        moments = self.updates.whole_moments(self.updates.moments(), keep=not self.run.follows)
        if self.run.follows:
            return
        self.run.sync_metrics()
        tensors = {"model": self.model.trainable_state(), "optimizer": moments | self.adversary.state()}
        state = {"step": self.step, "facts": self.facts, "times": self.stopwatch.state()}
        keep, allowed = self.training.keep_checkpoints, self.run.require_ownership
        save_checkpoint(self.run.checkpoints, self.step, tensors, state, keep, allowed)
        self.run.write_status(Status.running, self.step)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint: weights, optimiser, step, times; metrics logged after it are dropped."""
        self.set_state(checkpoint.tensors["model"], checkpoint.tensors["optimizer"], step=checkpoint.step)
        self.facts = checkpoint.state["facts"] | self.facts
        self.stopwatch.add(checkpoint.state.get("times", {}))
        self._is_restored = True
        self.run.truncate_metrics(self.step)

    def is_due(self, every: int) -> bool:
        """Whether something done every so many steps, and after the last, is due now."""
        return self.step % every == 0 or self.step == self.training.steps

    def is_recorded(self, step: int) -> bool:
        """Whether this step is logged, measured or saved."""
        often = (self.training.log_every, self.training.checkpoint_every, self.evaluation.every)
        return step == self.training.steps or any(step % every == 0 for every in often)

    def require_finite(self, loss: StepLoss) -> None:
        """Raise TrainingError if the loss or a gradient norm that was taken is not finite."""
        require_finite(loss, self.gradient_norms, step=self.step, advice=self._advice)

    @property
    def _advice(self) -> str:
        return what_to_try(self.training, self.run.checkpoints)

    def numbers_of(self, loss: StepLoss) -> dict[str, float]:
        """What the metrics log holds of the step just taken."""
        norms = {f"grad_norm/{part}": norm.item() for part, norm in self.gradient_norms.items()}
        return loss.numbers() | norms | {"lr": self.lr}

    def measure(self) -> EvaluationResult:
        """Evaluate the model as it is."""
        with self.stopwatch.counting("eval"):
            return self.evaluate(self.step)

    def require_finite_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Raise TrainingError if the loss that was measured is not finite."""
        require_finite_evaluation(metrics, step=self.step, advice=self._advice)

    def _require_finite_weights(self) -> None:
        weights = self.updates.components + self.updates.ci_fn
        require_finite_weights(weights, step=self.step, advice=self._advice)

    def _evaluate(self) -> EvaluationResult:
        result = self.measure()
        self.require_finite_evaluation(result.metrics)
        self.log("eval", result.row())
        every = self.evaluation.figures_every
        if self.evaluation.figures and every and self.step % every == 0 and self.step < self.training.steps:
            self.on_figures(result)
        return result

    def log(self, split: str, numbers: dict[str, float], step: int | None = None) -> None:
        """Add a row to the metrics of a step, by default the present one."""
        step = self.step if step is None else step
        self.run.append_metrics(step, split, numbers)
        self.tracker.log(step, split, numbers)


def compiles_blocks(objective: Objective, training: Training) -> bool:
    """Whether blocks are compiled one by one, rather than the step as a whole, if anything is compiled."""
    model, asked = objective.model, training.compile_blocks
    if model.patched.n_blocks == 0 or model.patched.shares_products or training.replicas > 1:
        return False
    return objective.block_runs > _MOST_BLOCK_RUNS if asked is None else asked
