"""Several initialisations of one decomposition, of which the one with the lowest loss goes on.

By successive halving: all get the first share of the steps; the better half of them gets as many again, and
so on with twice the steps and half the number, until one is left. So one that is clearly worse ends early,
and the last ones are compared when their losses tell most.

What one initialisation is trained in one round is a part. After each the state of all is saved.
"""

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from spd_hydra import competition, distributed
from spd_hydra.competition import Beginning, Rows, Standing
from spd_hydra.counted import counted
from spd_hydra.distributed import say
from spd_hydra.finite import TrainingError
from spd_hydra.loss.objective import StepLoss
from spd_hydra.progress import Progress, format_number
from spd_hydra.replicas import Group, mean_summary
from spd_hydra.run_dir import RunDirectory
from spd_hydra.saved_run import require_same_data, require_same_target
from spd_hydra.stop import Stopped
from spd_hydra.trainer import Trainer
from spd_hydra.trainer_config import Training

logger = logging.getLogger(__name__)

InitialState = Callable[[int], dict[str, Tensor]]
"""Untrained parameters of the n-th initialisation; 0 is the one that the model starts with."""


def begin_with_best(
    group: Group,
    initial_states: Sequence[InitialState],
    names: Sequence[str] = (),
    directory: RunDirectory | None = None,
) -> list[TrainingError | None]:
    """Give each initialisation its first steps and leave each trainer at the one of lowest training loss.

    Does nothing if the configuration asks for one initialisation. These steps count as steps of the run; the
    rows of metrics of the chosen one are logged once it is chosen, and a checkpoint is saved then. An
    initialisation whose loss stops being finite drops out. A choice that was interrupted is gone on with.

    Args:
        group: its trainers at step 0.
        initial_states: of each trainer.
        names: of each trainer, for what is told of it; none where there is but one.
        directory: has the state of the choice while it lasts; None: that of the first trainer.

    Returns:
        For each trainer None, or why no initialisation is left.

    Raises:
        Stopped: a signal asked for it; the state was saved.
        CheckpointError: the state could not be saved.
    """
    first = group.trainers[0]
    if not rounds(first.training):
        return [None] * len(group.trainers)
    owners = [f"{name}: " for name in names] or [""] * len(group.trainers)
    choices = [_Choice(*own) for own in zip(group.trainers, initial_states, owners, strict=True)]
    directory = first.run if directory is None else directory
    with first.signals.stepping(saving=competition.WHAT):
        _compete(group, choices, directory)
        errors = [choice.settle() for choice in choices]
        group.save(without={number: error for number, error in enumerate(errors) if error is not None})
        competition.remove(directory)
    return errors


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


class _Part(NamedTuple):
    """One initialisation in one round: its place among those that are left, from which step to which."""

    place: int
    start: int
    end: int
    taken: int  # steps of all parts before
    is_last: bool  # of its round


def _parts(training: Training) -> Iterator[_Part]:
    start = taken = 0
    for number, end in rounds(training):
        for place in range(number):
            yield _Part(place, start, end, taken, is_last=place == number - 1)
            taken += end - start
        start = end


def _compete(group: Group, choices: "Sequence[_Choice]", directory: RunDirectory) -> None:
    """Train all parts, or those that are left of a choice that was interrupted."""
    first = group.trainers[0]
    parts = [*_parts(first.training)]
    all_steps = total_steps(rounds(first.training))
    done, at = _go_on(choices, directory, parts)

    def save(done: int, at: int | None = None) -> None:
        taken, start = (parts[done].taken, parts[done].start) if done < len(parts) else (all_steps, 0)
        at = start if at is None else at
        standings = [choice.standing for choice in choices]
        competition.save(directory, group.trainers, standings, parts=done, at=at, taken=taken + at - start)

    begun = parts[done].taken + at - parts[done].start if done < len(parts) else all_steps
    progress = Progress(all_steps, begun, what="initialisations, step", disable=first.run.follows)
    with progress:
        for number, part in list(enumerate(parts))[done:]:
            of = choices[0].named(part.place)
            for choice in choices:
                choice.take_up(part.place, at if number == done else part.start)
            group.begin()
            ends, stopped = _take_steps(group, part, progress)
            for choice, end in zip(choices, ends, strict=True):
                choice.put_down(part.place, end)
            if stopped is None:
                for choice in choices if part.is_last else ():
                    choice.compare(part.end)
                save(number + 1)
                stopped = first.signals.agreed()
            else:
                save(number, first.step)
            if stopped is not None:
                stopped.step, stopped.of = first.step, of
                raise stopped


def _go_on(choices: "Sequence[_Choice]", directory: RunDirectory, parts: Sequence[_Part]) -> tuple[int, int]:
    """How many parts are done, and the step that the next one has come to.

    Raises:
        ConfigError: the text or the target was changed since.
    """
    trainers = [choice.trainer for choice in choices]
    saved = competition.load(directory, competition.settings_of(trainers[0]))
    if saved is None:
        return 0, 0
    for trainer, said in zip(trainers, saved.said, strict=True):
        require_same_data(trainer.facts.get("data", {}), said, competition.WHAT)
        require_same_target(trainer.facts.get("target", {}), said, competition.WHAT)
    for choice, standing, said in zip(choices, saved.standings, saved.said, strict=True):
        choice.standing = standing
        choice.trainer.stopwatch.add(said["times"])
    if saved.parts < len(parts):
        of = choices[0].named(parts[saved.parts].place)
        say(f"going on with {competition.WHAT}, from step {saved.at} of {of}")
    return saved.parts, saved.at


class _Choice:
    """The initialisations of one trainer, as far as they have come."""

    def __init__(self, trainer: Trainer, initial_state: InitialState, owner: str) -> None:
        self.trainer, self._initial_state, self._owner = trainer, initial_state, owner
        self.standing = Standing.at_start(trainer.training.restarts.number)

    def named(self, place: int) -> str:
        """The initialisation at this place, for what is told of it."""
        return f"initialisation {self.standing.left[place] + 1} of {len(self.standing.ends)}"

    def take_up(self, place: int, step: int) -> None:
        """Set the trainer to the initialisation at this place, which has come to this step."""
        number = self.standing.left[place]
        end = self.standing.ends[number]
        if isinstance(end, Beginning):
            self.trainer.set_state(end.parameters, end.optimizer, step=step)
        else:  # not begun, or broken: a group takes the same steps for all of its trainers
            self.trainer.set_state(self._initial_state(number), {}, step=0)
            self.trainer.updates.fit_weights()
            self.trainer.step = step

    def put_down(self, place: int, end: Beginning | TrainingError) -> None:
        """Keep what became of it."""
        number = self.standing.left[place]
        before = self.standing.ends[number]
        if isinstance(before, TrainingError):
            return
        if isinstance(end, TrainingError):
            logger.warning("%sinitialisation %d drops out: %s", self._owner, number + 1, end)
        elif isinstance(before, Beginning):
            end = end._replace(rows=[*before.rows, *end.rows])
        self.standing.ends[number] = end

    def compare(self, steps: int) -> None:
        """Write down the losses, and leave out the worse half, of which only the errors are kept."""
        left, ends = self.standing.left, self.standing.ends
        losses = [self._loss(number) if number in left else None for number in range(len(ends))]
        self.standing.rounds.append({"steps": steps, "losses": losses})
        left.sort(key=lambda number: math.inf if (loss := losses[number]) is None else loss)
        del left[math.ceil(len(left) / 2) :]
        self.standing.ends = [
            None if isinstance(end, Beginning) and number not in left else end
            for number, end in enumerate(ends)
        ]

    def _loss(self, number: int) -> float | None:
        end = self.standing.ends[number]
        return end.loss if isinstance(end, Beginning) and math.isfinite(end.loss) else None

    def settle(self) -> TrainingError | None:
        """Leave the trainer at the best; the error of the last initialisation if none is left."""
        trainer, played = self.trainer, self.standing.rounds
        chosen, steps = self.standing.left[0], played[-1]["steps"]
        best = self.standing.ends[chosen]
        if not isinstance(best, Beginning):
            trainer.set_state(self._initial_state(chosen), {}, step=steps)  # what the group needs of it
            return next(end for end in reversed(self.standing.ends) if isinstance(end, TrainingError))
        trainer.set_state(best.parameters, best.optimizer, step=steps)
        for step, numbers in best.rows:
            trainer.log("train", numbers, step)
        trainer.log("eval", best.measured)
        others = total_steps(rounds(trainer.training)) - steps
        trainer.facts["restarts"] = {"chosen": chosen, "rounds": played, "steps_of_others": others}
        for one in played:
            texts = [format_number(loss) for loss in one["losses"] if loss is not None]
            those, after = counted(len(texts), "initialisation"), counted(one["steps"], "step")
            logger.info("%slosses of %s after %s: %s", self._owner, those, after, ", ".join(texts))
        return None


def _take_steps(
    group: Group, part: _Part, progress: Progress
) -> tuple[list[Beginning | TrainingError], Stopped | None]:
    """Train all to the end of a part and measure them, or to where a signal asks for a stop."""
    trainers = group.trainers
    rows: list[Rows] = [[] for _ in trainers]
    losses: list[StepLoss | TrainingError] = []
    stopped = None
    while trainers[0].step < part.end and stopped is None:
        losses = group.train_step()
        if all(isinstance(loss, TrainingError) for loss in losses):
            return [loss for loss in losses if isinstance(loss, TrainingError)], None
        step = trainers[0].step
        taken = part.taken + step - part.start
        progress.update(taken, lambda losses=losses: mean_summary(losses))  # type: ignore[misc]
        for own, trainer, loss in zip(rows, trainers, losses, strict=True):
            if isinstance(loss, StepLoss) and trainer.is_due(trainer.training.log_every):
                own.append((step, trainer.numbers_of(loss)))
        if step < part.end:
            stopped = trainers[0].signals.agreed()
    reached = _beginning if stopped is None else _middle
    return [
        loss if isinstance(loss, TrainingError) else reached(trainer, own)
        for own, trainer, loss in zip(rows, trainers, losses, strict=True)
    ], stopped


def _beginning(trainer: Trainer, rows: Rows) -> Beginning | TrainingError:
    measured = distributed.of_rank_0(trainer.measure().row())  # what decides is the same on every rank
    try:
        trainer.require_finite_evaluation(measured)
    except TrainingError as error:
        return error
    parameters, optimizer = trainer.state()
    return Beginning(trainer.step, _cloned(parameters), _cloned(optimizer), rows, measured)


def _middle(trainer: Trainer, rows: Rows) -> Beginning:
    """What is saved of a part that is not at its end."""
    return Beginning(trainer.step, *trainer.state(), rows, {})


def _cloned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in tensors.items()}
