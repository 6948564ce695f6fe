"""Several initialisations of one decomposition, of which the one with the lowest loss goes on."""

import logging
import math
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from spd_hydra import distributed
from spd_hydra.progress import Progress, format_number
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


def begin_with_best(trainer: Trainer, initial_state: Callable[[int], dict[str, Tensor]]) -> None:
    """Give each initialisation its first steps and leave the trainer at the one of lowest training loss.

    Does nothing if the configuration asks for one initialisation. The first steps count as steps of the run;
    the rows of metrics of the chosen one are logged once it is chosen. An initialisation whose loss stops
    being finite drops out.

    Args:
        trainer: at step 0.
        initial_state: untrained parameters of the n-th initialisation; 0 is the one the model starts with.

    Raises:
        TrainingError: none is left.
        Stopped: a signal asked for it; nothing was saved.
    """
    restarts = trainer.training.restarts
    if restarts.number == 1:
        return
    steps = max(1, int(restarts.fraction * trainer.training.steps))
    best: Beginning | None = None
    losses: list[float | None] = []
    progress = Progress(steps * restarts.number, what="initialisations, step", disable=trainer.run.follows)
    with trainer.signals.stepping(), progress:
        for number in range(restarts.number):
            trainer.set_state(initial_state(number), {}, step=0)
            try:
                beginning = _first_steps(trainer, steps, progress, done=number * steps)
            except TrainingError as error:
                if number == restarts.number - 1 and best is None:
                    raise
                logger.warning("initialisation %d drops out: %s", number + 1, error)
                losses.append(None)
                continue
            losses.append(beginning.loss)
            if best is None or _rank(beginning) < _rank(best):
                best = beginning
    assert best is not None, "the last one raises if none is left"
    trainer.set_state(best.parameters, best.optimizer, step=steps)
    for step, numbers in best.rows:
        trainer.log("train", numbers, step)
    trainer.log("eval", best.measured)
    trainer.facts["restarts"] = {"steps": steps, "losses": losses, "chosen": losses.index(best.loss)}
    texts = ["not finite" if loss is None else format_number(loss) for loss in losses]
    logger.info("losses of %d initialisations after %d steps: %s", len(losses), steps, ", ".join(texts))


def _first_steps(trainer: Trainer, steps: int, progress: Progress, *, done: int) -> Beginning:
    trainer.fit_weights()
    trainer.take_from_rank_0()
    rows: list[tuple[int, dict[str, float]]] = []
    while trainer.step < steps:
        loss = trainer.train_step()
        progress.update(done + trainer.step, lambda loss=loss: loss.summary())  # type: ignore[misc]
        if trainer.is_due(trainer.training.log_every):
            rows.append((trainer.step, trainer.numbers_of(loss)))
        trainer.stop_if_asked(saving=False)
    measured = distributed.of_rank_0(trainer.measure().metrics)  # what decides is the same on every rank
    parameters, optimizer = trainer.state()
    return Beginning(_cloned(parameters), _cloned(optimizer), rows, measured)


def _rank(beginning: Beginning) -> float:
    return beginning.loss if math.isfinite(beginning.loss) else math.inf


def _cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}
