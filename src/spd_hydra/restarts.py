"""Several initialisations of one decomposition, of which the one with the lowest loss goes on.

By successive halving: all get the first share of the steps; the better half of them gets as many again, and
so on with twice the steps and half the number, until one is left. So one that is clearly worse ends early,
and the last ones are compared when their losses tell most.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from spd_hydra import distributed
from spd_hydra.counted import counted
from spd_hydra.finite import TrainingError
from spd_hydra.loss.objective import StepLoss
from spd_hydra.progress import Progress, format_number
from spd_hydra.replicas import Group, mean_summary
from spd_hydra.trainer import Trainer
from spd_hydra.trainer_config import Training

logger = logging.getLogger(__name__)


class Beginning(NamedTuple):
    """An initialisation after some steps.

    Its parameters and optimiser state, its rows of metrics, and what was measured then.
    """

    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rows: list[tuple[int, dict[str, float]]]
    measured: dict[str, float]

    @property
    def loss(self) -> float:
        """Training loss, averaged over the evaluation's batches."""
        return self.measured["loss/total"]


InitialState = Callable[[int], dict[str, Tensor]]
"""Untrained parameters of the n-th initialisation; 0 is the one that the model starts with."""


def begin_with_best(
    group: Group, initial_states: Sequence[InitialState], names: Sequence[str] = ()
) -> list[TrainingError | None]:
    """Give each initialisation its first steps and leave each trainer at the one of lowest training loss.

    Does nothing if the configuration asks for one initialisation. These steps count as steps of the run; the
    rows of metrics of the chosen one are logged once it is chosen. An initialisation whose loss stops being
    finite drops out.

    Args:
        group: its trainers at step 0.
        initial_states: of each trainer.
        names: of each trainer, for what is told of it; none where there is but one.

    Returns:
        For each trainer None, or why no initialisation is left.

    Raises:
        Stopped: a signal asked for it; nothing was saved.
    """
    first = group.trainers[0]
    plan = rounds(first.training)
    if not plan:
        return [None] * len(group.trainers)
    owners = [f"{name}: " for name in names] or [""] * len(group.trainers)
    choices = [_Choice(*own) for own in zip(group.trainers, initial_states, owners, strict=True)]
    done, all_steps, before = 0, total_steps(plan), 0
    progress = Progress(all_steps, what="initialisations, step", disable=first.run.follows)
    with first.signals.stepping(), progress:
        for number, steps in plan:
            for place in range(number):
                for choice in choices:
                    choice.take_up(place)
                group.begin()
                ends = _take_steps(group, steps, progress, done=done - before)
                for choice, end in zip(choices, ends, strict=True):
                    choice.put_down(place, end)
                done += steps - before
            for choice in choices:
                choice.compare(steps)
            before = steps
    return [choice.settle(before) for choice in choices]


def rounds(training: Training) -> list[tuple[int, int]]:
    """How many initialisations are trained up to which step, by round; none if there is no choice."""
    number, share = training.restarts.number, training.restarts.fraction
    found: list[tuple[int, int]] = []
    end = 0
    while number > 1 and end < training.steps:
        end = min(max(end + 1, int(share * training.steps)), training.steps)  # each round takes a step
        found.append((number, end))
        number, share = math.ceil(number / 2), 2 * share
    return found


def total_steps(plan: Sequence[tuple[int, int]]) -> int:
    """Steps of all rounds and initialisations together."""
    ends = [0, *(steps for _, steps in plan)]
    return sum(number * (end - start) for (number, end), start in zip(plan, ends, strict=False))


class _Choice:
    """The initialisations of one trainer: how far each has come, and which are left, best first."""

    def __init__(self, trainer: Trainer, initial_state: InitialState, owner: str) -> None:
        self._trainer, self._initial_state, self._owner = trainer, initial_state, owner
        number = trainer.training.restarts.number
        self._left = list(range(number))
        self._ends: list[Beginning | TrainingError | None] = [None] * number
        self._rounds: list[dict[str, Any]] = []

    def take_up(self, place: int) -> None:
        """Set the trainer to where the initialisation at this place has come."""
        number = self._left[place]
        end = self._ends[number]
        if isinstance(end, Beginning):
            self._trainer.set_state(end.parameters, end.optimizer, step=self._rounds[-1]["steps"])
        else:  # not begun, or broken: a group takes the same steps for all of its trainers
            self._trainer.set_state(self._initial_state(number), {}, step=0)
            self._trainer.updates.fit_weights()
            self._trainer.step = self._rounds[-1]["steps"] if self._rounds else 0

    def put_down(self, place: int, end: "Beginning | TrainingError") -> None:
        """Keep what became of it."""
        number = self._left[place]
        before = self._ends[number]
        if isinstance(end, TrainingError):
            logger.warning("%sinitialisation %d drops out: %s", self._owner, number + 1, end)
        elif isinstance(before, Beginning):
            end = end._replace(rows=[*before.rows, *end.rows])
        self._ends[number] = before if isinstance(before, TrainingError) else end

    def compare(self, steps: int) -> None:
        """Write down the losses, and leave out the worse half."""
        losses = [self._loss(number) if number in self._left else None for number in range(len(self._ends))]
        self._rounds.append({"steps": steps, "losses": losses})
        self._left.sort(key=lambda number: math.inf if losses[number] is None else losses[number] or 0.0)
        del self._left[math.ceil(len(self._left) / 2) :]

    def _loss(self, number: int) -> float | None:
        end = self._ends[number]
        return end.loss if isinstance(end, Beginning) and math.isfinite(end.loss) else None

    def settle(self, steps: int) -> TrainingError | None:
        """Leave the trainer at the best; the error of the last initialisation if none is left."""
        chosen, trainer = self._left[0], self._trainer
        best = self._ends[chosen]
        if not isinstance(best, Beginning):
            trainer.set_state(self._initial_state(chosen), {}, step=steps)  # what the group needs of it
            return next(end for end in reversed(self._ends) if isinstance(end, TrainingError))
        trainer.set_state(best.parameters, best.optimizer, step=steps)
        for step, numbers in best.rows:
            trainer.log("train", numbers, step)
        trainer.log("eval", best.measured)
        others = total_steps(rounds(trainer.training)) - steps
        trainer.facts["restarts"] = {"chosen": chosen, "rounds": self._rounds, "steps_of_others": others}
        for one in self._rounds:
            texts = [format_number(loss) for loss in one["losses"] if loss is not None]
            those, after = counted(len(texts), "initialisation"), counted(one["steps"], "step")
            logger.info("%slosses of %s after %s: %s", self._owner, those, after, ", ".join(texts))
        if steps == trainer.training.steps:  # nothing is left to train, and so to save, for others
            trainer.save()
        return None


def _take_steps(
    group: Group, steps: int, progress: Progress, *, done: int
) -> list["Beginning | TrainingError"]:
    """Train all up to this step; `done` is what the progress adds to the step."""
    trainers = group.trainers
    rows: list[list[tuple[int, dict[str, float]]]] = [[] for _ in trainers]
    losses: list[StepLoss | TrainingError] = []
    while trainers[0].step < steps:
        losses = group.train_step()
        if all(isinstance(loss, TrainingError) for loss in losses):
            return [loss for loss in losses if isinstance(loss, TrainingError)]
        step = trainers[0].step
        progress.update(done + step, lambda losses=losses: mean_summary(losses))  # type: ignore[misc]
        for own, trainer, loss in zip(rows, trainers, losses, strict=True):
            if isinstance(loss, StepLoss) and trainer.is_due(trainer.training.log_every):
                own.append((step, trainer.numbers_of(loss)))
        trainers[0].stop_if_asked(saving=False)
    return [
        loss if isinstance(loss, TrainingError) else _beginning(trainer, own)
        for own, trainer, loss in zip(rows, trainers, losses, strict=True)
    ]


def _beginning(trainer: Trainer, rows: list[tuple[int, dict[str, float]]]) -> "Beginning | TrainingError":
    measured = distributed.of_rank_0(trainer.measure().metrics)  # what decides is the same on every rank
    try:
        trainer.require_finite_evaluation(measured)
    except TrainingError as error:
        return error
    parameters, optimizer = trainer.state()
    return Beginning(_cloned(parameters), _cloned(optimizer), rows, measured)


def _cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}
