"""Several initialisations of one decomposition, of which the one with the lowest loss goes on."""

import logging
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from spd_hydra import distributed
from spd_hydra.loss.objective import StepLoss
from spd_hydra.progress import Progress, format_number
from spd_hydra.replicas import Group, mean_summary
from spd_hydra.trainer import Trainer, TrainingError

logger = logging.getLogger(__name__)


class Beginning(NamedTuple):
    """An initialisation after its first steps.

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


def begin_with_best(group: Group, initial_states: Sequence[InitialState]) -> list[TrainingError | None]:
    """Give each initialisation its first steps and leave each trainer at the one of lowest training loss.

    Does nothing if the configuration asks for one initialisation. The first steps count as steps of the run;
    the rows of metrics of the chosen one are logged once it is chosen. An initialisation whose loss stops
    being finite drops out.

    Args:
        group: its trainers at step 0.
        initial_states: of each trainer.

    Returns:
        For each trainer None, or why no initialisation is left.

    Raises:
        Stopped: a signal asked for it; nothing was saved.
    """
    first = group.trainers[0]
    restarts = first.training.restarts
    if restarts.number == 1:
        return [None] * len(group.trainers)
    steps = max(1, int(restarts.fraction * first.training.steps))
    choices = [_Choice(trainer) for trainer in group.trainers]
    progress = Progress(steps * restarts.number, what="initialisations, step", disable=first.run.follows)
    with first.signals.stepping(), progress:
        for number in range(restarts.number):
            for trainer, initial_state in zip(group.trainers, initial_states, strict=True):
                trainer.set_state(initial_state(number), {}, step=0)
                trainer.fit_weights()
            group.begin()
            for choice, beginning in zip(
                choices, _first_steps(group, steps, progress, done=number * steps), strict=True
            ):
                choice.add(beginning)
    return [choice.settle(steps) for choice in choices]


class _Choice:
    """The initialisations of one trainer so far: the best of them, and the losses of all."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._best: Beginning | None = None
        self._losses: list[float | None] = []
        self._error: TrainingError | None = None

    def add(self, beginning: "Beginning | TrainingError") -> None:
        if isinstance(beginning, TrainingError):
            self._error = beginning
            self._losses.append(None)
            logger.warning("initialisation %d drops out: %s", len(self._losses), beginning)
            return
        self._losses.append(beginning.loss)
        if self._best is None or _rank(beginning) < _rank(self._best):
            self._best = beginning

    def settle(self, steps: int) -> TrainingError | None:
        """Leave the trainer at the best; the error of the last initialisation if none is left."""
        best, trainer = self._best, self._trainer
        if best is None:
            return self._error
        trainer.set_state(best.parameters, best.optimizer, step=steps)
        for step, numbers in best.rows:
            trainer.log("train", numbers, step)
        trainer.log("eval", best.measured)
        chosen = self._losses.index(best.loss)
        trainer.facts["restarts"] = {"steps": steps, "losses": self._losses, "chosen": chosen}
        texts = ["not finite" if loss is None else format_number(loss) for loss in self._losses]
        logger.info("losses of %d initialisations after %d steps: %s", len(texts), steps, ", ".join(texts))
        return None


def _first_steps(
    group: Group, steps: int, progress: Progress, *, done: int
) -> list["Beginning | TrainingError"]:
    trainers = group.trainers
    rows: list[list[tuple[int, dict[str, float]]]] = [[] for _ in trainers]
    losses: list[StepLoss | TrainingError] = []
    for step in range(1, steps + 1):
        losses = group.train_step()
        if all(isinstance(loss, TrainingError) for loss in losses):
            return [loss for loss in losses if isinstance(loss, TrainingError)]
        progress.update(done + step, lambda losses=losses: mean_summary(losses))  # type: ignore[misc]
        for own, trainer, loss in zip(rows, trainers, losses, strict=True):
            if isinstance(loss, StepLoss) and trainer.is_due(trainer.training.log_every):
                own.append((trainer.step, trainer.numbers_of(loss)))
        trainers[0].stop_if_asked(saving=False)
    return [
        loss if isinstance(loss, TrainingError) else _beginning(trainer, own)
        for own, trainer, loss in zip(rows, trainers, losses, strict=True)
    ]


def _beginning(trainer: Trainer, rows: list[tuple[int, dict[str, float]]]) -> Beginning:
    measured = distributed.of_rank_0(trainer.measure().metrics)  # what decides is the same on every rank
    parameters, optimizer = trainer.state()
    return Beginning(_cloned(parameters), _cloned(optimizer), rows, measured)


def _rank(beginning: Beginning) -> float:
    return beginning.loss if math.isfinite(beginning.loss) else math.inf


def _cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}
