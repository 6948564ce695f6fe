"""Several decompositions of one shape trained at once: each becomes what it would be alone.

A step of a toy model is mostly the launching of small kernels. Replicas share those launches: their
parameters, targets, data and random numbers lie along a leading axis.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from spd_hydra.compiling import can_compile
from spd_hydra.finite import TrainingError
from spd_hydra.graph import GraphedStep, graphed_step
from spd_hydra.loss.objective import StepLoss
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.optimizer import adamw, in_same_memory, set_lr
from spd_hydra.progress import Progress
from spd_hydra.run_dir import Status
from spd_hydra.sampler import StackedSampler
from spd_hydra.step import StackedStep
from spd_hydra.stop import kept_from_children
from spd_hydra.trainer import Trainer

logger = logging.getLogger(__name__)

DROPPED = "TrainingError: "
"""How the error of a replica that dropped out begins in its status."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Group(Protocol):
    """One or more trainers that take their steps together."""

    @property
    def trainers(self) -> Sequence[Trainer]:
        """The trainers, all at the same step."""

    def begin(self) -> None:
        """Make the states that the trainers were set to the ones that the next step changes."""

    def train_step(self) -> list[StepLoss | TrainingError]:
        """Take a step; for each trainer its loss, or why it cannot go on."""

    def save(self, without: Mapping[int, TrainingError]) -> None:
        """Write a checkpoint of each trainer but those, by number, that will not go on, and why."""


class Alone:
    """A group of one."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainers = [trainer]

    def begin(self) -> None:
        """All ranks go on from the same state."""
        self.trainers[0].take_from_rank_0()

    def train_step(self) -> list[StepLoss | TrainingError]:
        """A step, or the error that ends the training."""
        try:
            return [self.trainers[0].train_step()]
        except TrainingError as error:
            return [error]

    def save(self, without: Mapping[int, TrainingError]) -> None:
        """A checkpoint, unless the training ends; who called says why."""
        if not without:
            self.trainers[0].save_whole()


class Replicas:
    """Trainers of the same configuration but for the seed, whose steps are one.

    Each trainer's parameters and optimiser moments are views of the stacked ones, so that it evaluates, logs
    and saves as if it were alone. One whose loss is no longer finite drops out; the others go on.

    Args:
        trainers: at the same step; their configurations differ in the seed alone.
    """

    def __init__(self, trainers: Sequence[Trainer]) -> None:
        self.trainers = list(trainers)
        first = trainers[0]
        self.training = first.training
        self._is_on_cpu = first.model.device.type == "cpu"
        compile = self.training.compile and can_compile(first.model.device.type)
        for trainer in trainers:  # a trainer that is alone may compile blocks one by one, which vmap refuses
            trainer.model.compiled_blocks = None
        self._step = StackedStep([trainer.objective for trainer in trainers], compile=compile)
        self._sampler = StackedSampler([trainer.sampler for trainer in trainers], compile=compile)
        names = [name for name, p in first.model.named_parameters() if p.requires_grad]
        stacked = [self._step.parameters[f"model.{name}"] for name in names]
        own = dict(zip([id(first.model.get_parameter(name)) for name in names], stacked, strict=True))
        self._parts = {
            "components": [own[id(p)] for p in first.updates.components],
            "ci_fn": [own[id(p)] for p in first.updates.ci_fn],
        }
        self._members = [
            [trainer.model.get_parameter(name) for name in names] for trainer in trainers
        ]  # by replica, in the order of `_stacked`
        self._stacked = stacked
        self._optimizer = adamw(
            [[own[id(p)] for p in group] for _, group in first.updates.groups],
            lr=self.training.lr,
            weight_decay=0.0,
            factors=[factor for factor, _ in first.updates.groups],
        )
        self._is_to_be_compiled = compile
        self._is_prepared = False
        self._graph: GraphedStep | None = None
        self._split: tuple[StepLoss, list[StepLoss]] | None = None  # the last loss, and those of the replicas
        self.failed: dict[int, TrainingError] = {}
        self._left_out: dict[int, TrainingError] = {}
        self._shares_moments = False

    @property
    def step(self) -> int:
        """Steps done by those that are left."""
        left = [trainer.step for number, trainer in enumerate(self.trainers) if number not in self.failed]
        return left[0] if left else self.trainers[0].step

    def fit(self) -> list[Evaluation | TrainingError]:
        """Train to the last step; for each trainer its last evaluation, or why it dropped out.

        Raises:
            Stopped: a signal asked for it; a checkpoint of every trainer was saved.
        """
        if self.step == 0:
            for trainer in self.trainers:
                trainer.updates.fit_weights()
        self.begin()
        self._tell_failed(self.failed)
        results: list[Evaluation | None] = [None] * len(self.trainers)
        first = self.trainers[0]
        progress = Progress(self.training.steps, self.step)
        with first.signals.stepping(), progress:
            while self.step < self.training.steps and len(self.failed) < len(self.trainers):
                before = set(self.failed)
                losses = self.train_step()
                self._tell_failed(self.failed.keys() - before)
                progress.update(self.step, lambda losses=losses: mean_summary(losses))  # type: ignore[misc]
                for number, (trainer, loss) in enumerate(zip(self.trainers, losses, strict=True)):
                    if isinstance(loss, StepLoss):
                        results[number] = self._record(number, trainer, loss)
                if self.step < self.training.steps:
                    self._stop_if_asked()
        return [
            self.failed.get(number) or result or trainer.evaluate(self.step)
            for number, (trainer, result) in enumerate(zip(self.trainers, results, strict=True))
        ]

    def _record(self, number: int, trainer: Trainer, loss: StepLoss) -> Evaluation | None:
        try:
            return trainer.record(loss)
        except TrainingError as error:
            self._drop(number, error)
            self._tell_failed([number])
            return None

    def leave_out(self, errors: Mapping[int, TrainingError]) -> None:
        """Go on without these trainers, by number."""
        self._left_out = dict(errors)

    def begin(self) -> None:
        """Take over the trainers' moments; their parameters are views of the stacked ones already."""
        self.failed = dict(self._left_out)
        with nullcontext() if self._graph is None else in_same_memory(self._optimizer):
            self._shares_moments = self._stack_moments()
        if self._shares_moments:
            self._share_moments()

    def _stack_moments(self) -> bool:
        """Make the optimiser's moments those of the trainers, if any has some."""
        self._optimizer.state.clear()
        states: list[list[dict[str, Tensor]]] = [
            [trainer.updates.optimizer.state.get(p, {}) for p in own]
            for trainer, own in zip(self.trainers, self._members, strict=True)
        ]
        whole = next((replica for replica in states if all(replica)), None)
        if whole is None:
            return False
        for index, parameter in enumerate(self._stacked):
            # One that broke at its start has no moments; the others must not lose theirs.
            parts = [replica[index] or _no_moments(whole[index]) for replica in states]
            moments = {what: torch.stack([p[what] for p in parts]) for what in _MOMENTS}
            self._optimizer.state[parameter] = {"step": whole[index]["step"].clone(), **moments}
        return True

    def train_step(self) -> list[StepLoss | TrainingError]:
        """One step of all: draw, schedule, loss, gradients, update."""
        first = self.trainers[0]
        alone = kept_from_children() if self._is_to_be_compiled else nullcontext()
        with alone, first.stopwatch.counting("compile" if self._is_to_be_compiled else "train"):
            losses = self._train_step()
        for trainer in self.trainers:
            trainer.stopwatch.steps += not self._is_to_be_compiled
            if trainer is not first:  # all of them waited for the same step
                trainer.stopwatch.seconds |= {
                    what: first.stopwatch.seconds[what] for what in ("compile", "train")
                }
        self._is_to_be_compiled = False
        return losses

    def _train_step(self) -> list[StepLoss | TrainingError]:
        if not self._is_prepared:
            self._prepare()
        first, step = self.trainers[0], self.step
        lr = self.training.lr * self.training.lr_schedule.factor(step, self.training.steps)
        stacked = self._loss_and_gradients(step, lr)
        recorded = first.is_recorded(step + 1)
        losses = self._losses_of_each(stacked)
        if recorded or self._is_on_cpu:
            norms = self._norms() if recorded else {}
            finite = stacked.total.isfinite().tolist()
            for number, trainer in enumerate(self.trainers):
                trainer.gradient_norms = {part: norm[number] for part, norm in norms.items()}
                if (recorded or not finite[number]) and number not in self.failed:
                    self._look_at(number, losses[number])
        if self._graph is None:
            self._update()
        else:
            self._graph.update()
        if not self._shares_moments:
            self._share_moments()
        for trainer in self.trainers:
            trainer.step, trainer.lr = step + 1, lr
        for number, trainer in enumerate(self.trainers):
            if number not in self.failed:
                trainer.join_if_due()
        return [self.failed.get(number, loss) for number, loss in enumerate(losses)]

    def _prepare(self) -> None:
        """What the first step needs."""
        first = self.trainers[0]
        if self._is_to_be_compiled:
            logger.info("compiling the training step of %d replicas", len(self.trainers))
        self._graph = graphed_step(
            self.training.cuda_graphs,
            sampler=self._sampler,
            step=self._step,
            objective=first.objective,
            optimizer=self._optimizer,
            update=self._update,
        )
        self._is_prepared = True

    def _loss_and_gradients(self, step: int, lr: float) -> StepLoss:
        progress = step / self.training.steps
        if self._graph is not None:
            return self._graph.gradients(step, lr=lr, progress=progress)
        set_lr(self._optimizer, lr)
        batch, draws = self._sampler(step)
        return self._step(batch, draws, self.trainers[0].objective.scheduled(progress))

    def _update(self) -> None:
        self._clip()
        self._optimizer.step()

    def _look_at(self, number: int, loss: StepLoss) -> None:
        trainer = self.trainers[number]
        try:
            trainer.require_finite(loss)
        except TrainingError as error:
            self._drop(number, error)

    def _drop(self, number: int, error: TrainingError) -> None:
        self.failed[number] = error
        logger.warning("replica %d drops out: %s", number, error)

    def _stop_if_asked(self) -> None:
        stopped = self.trainers[0].signals.agreed()
        if stopped is None:
            return
        self._save_those_left()
        if len(self.failed) == len(self.trainers):
            raise self.failed[0]
        stopped.step = self.step
        raise stopped

    def save(self, without: Mapping[int, TrainingError]) -> None:
        """A checkpoint of each of the others, once the status of those says why they drop out."""
        self.failed = self._left_out | dict(without)
        self._tell_failed(without)
        self._save_those_left()

    def _save_those_left(self) -> None:
        for number, trainer in enumerate(self.trainers):
            if number in self.failed:
                continue
            try:
                trainer.save_whole()
            except TrainingError as error:  # on a GPU its loss was perhaps not looked at
                self.failed[number] = error
                self._tell_failed([number])

    def _tell_failed(self, numbers: Iterable[int]) -> None:
        """Write down at once that a replica will not go on, so that the others can without it."""
        for number in numbers:
            trainer = self.trainers[number]
            trainer.run.write_status(Status.failed, trainer.step, error=f"{DROPPED}{self.failed[number]}")

    def _norms(self) -> dict[str, Tensor]:
        """Norms of the gradients of each replica, `[replicas]`, before any clipping."""
        return {
            part: torch.stack([_gradient(p).flatten(1).norm(dim=1) for p in own]).norm(dim=0)
            for part, own in self._parts.items()
        }

    def _clip(self) -> None:
        limits = {"components": self.training.clip_components, "ci_fn": self.training.clip_ci_fn}
        if not any(limits.values()):
            return
        norms = self._norms()
        for part, limit in limits.items():
            if limit is None:
                continue
            factor = (limit / (norms[part] + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_
            for parameter in self._parts[part]:
                gradient = _gradient(parameter)
                gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))

    def _share_moments(self) -> None:
        """Let each trainer's moments be views of the stacked ones, which is what it saves."""
        self._shares_moments = True
        for number, (trainer, members) in enumerate(zip(self.trainers, self._members, strict=True)):
            for parameter, stacked in zip(members, self._stacked, strict=True):
                state = self._optimizer.state[stacked]
                trainer.updates.optimizer.state[parameter] = {
                    "step": state["step"],
                    "exp_avg": state["exp_avg"][number],
                    "exp_avg_sq": state["exp_avg_sq"][number],
                }

    def _losses_of_each(self, stacked: StepLoss) -> list[StepLoss]:
        """The losses of the replicas; those of a replayed step are always in the same memory."""
        if self._split is None or self._split[0] is not stacked:
            self._split = stacked, [_one(stacked, number) for number in range(len(self.trainers))]
        return self._split[1]


def _one(stacked: StepLoss, number: int) -> StepLoss:
    """The loss of one replica."""
    return StepLoss(
        stacked.total[number],
        {name: term[number] for name, term in stacked.terms.items()},
        {site: value[number] for site, value in stacked.l0.items()},
    )


def _no_moments(like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {what: torch.zeros_like(like[what]) for what in _MOMENTS}


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None, "a step sets the gradient of every parameter"
    return parameter.grad


def mean_summary(losses: Sequence[StepLoss | TrainingError]) -> dict[str, float]:
    """What is shown while training goes on: means over the replicas that are left."""
    found = [loss.summary() for loss in losses if isinstance(loss, StepLoss)]
    return {key: sum(own[key] for own in found) / len(found) for key in found[0]} if found else {}
