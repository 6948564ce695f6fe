"""Of several initialisations the one of lowest training loss goes on, as if it had been the only one."""

import itertools
import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_hydra.checkpoint import load_newest
from spd_hydra.finite import TrainingError
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.replicas import Alone
from spd_hydra.restarts import begin_with_best, rounds
from spd_hydra.trainer import Trainer

Make = Callable[..., Trainer]
State = dict[str, Tensor]
STEPS = 6
HALF = ("train.restarts.fraction=0.5",)


def choose(trainer: Trainer, initial_state: Callable[[int], State]) -> None:
    if error := begin_with_best(Alone(trainer), [initial_state])[0]:
        raise error


def states_of(trainer: Trainer) -> Callable[[int], State]:
    """The n-th initialisation: what the model starts with, times 1 + n/10."""
    first = {name: value.clone() for name, value in trainer.model.trainable_state().items()}
    return lambda number: {name: value * (1 + number / 10) for name, value in first.items()}


def measured(trainer: Trainer, losses: list[float]) -> list[State]:
    """Let the evaluations after the beginnings give these losses; the list keeps the states they saw."""
    seen: list[State] = []

    def evaluate(step: int) -> Evaluation:
        loss = losses[len(seen)] if len(seen) < len(losses) else 0.0
        seen.append({name: value.clone() for name, value in trainer.model.trainable_state().items()})
        return Evaluation(step=step, n_positions=1, ci_threshold=0.1, metrics={"loss/total": loss}, sites={})

    trainer.evaluate = evaluate
    return seen


def rows(trainer: Trainer, split: str = "train") -> list[dict[str, Any]]:
    return [row for row in trainer.run.read_metrics() if row["split"] == split]


def equal(one: State, other: State) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_initialisation_of_lowest_loss_goes_on(make: Make) -> None:
    trainer = make("train.restarts.number=2", *HALF)
    seen = measured(trainer, [2.0, 1.0])
    choose(trainer, states_of(trainer))
    assert trainer.step == STEPS // 2
    assert len(seen) == 2
    assert equal(trainer.model.trainable_state(), seen[1])
    assert not equal(seen[0], seen[1])
    assert [row["step"] for row in rows(trainer)] == [1, 2, 3]
    assert [(row["step"], row["loss/total"]) for row in rows(trainer, "eval")] == [(3, 1.0)]


def test_the_worse_half_ends_at_each_comparison(make: Make) -> None:
    """Of 5, 3 get twice the steps, and 2 of them four times as many: the last comparison decides."""
    trainer = make("train.restarts.number=5", "train.restarts.fraction=0.17")
    assert rounds(trainer.training) == [(5, 1), (3, 2), (2, 4)]
    seen = measured(trainer, [5.0, 3.0, 9.0, 1.0, 2.0, 7.0, 6.0, 8.0, 1.0, 0.5])
    alone = make()
    alone.set_state(states_of(alone)(3), {}, step=0)
    choose(trainer, states_of(trainer))
    # Left after the first: 3 (loss 1), 4 (2), 1 (3), measured in that order as 7, 6, 8; then 4 and 3.
    assert trainer.facts["restarts"] == {
        "chosen": 3,
        "rounds": [
            {"steps": 1, "losses": [5.0, 3.0, 9.0, 1.0, 2.0]},
            {"steps": 2, "losses": [None, 8.0, None, 7.0, 6.0]},
            {"steps": 4, "losses": [None, None, None, 0.5, 1.0]},
        ],
        "steps_of_others": 5 + 3 + 2 * 2 - 4,
    }
    assert len(seen) == 10
    assert [row["step"] for row in rows(trainer)] == [1, 2, 3, 4]
    alone.updates.fit_weights()
    while alone.step < 4:
        alone.train_step()
    assert equal(trainer.model.trainable_state(), alone.model.trainable_state())


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 19, 40, 1000])
def test_every_round_takes_steps_however_few_there_are(make: Make, steps: int) -> None:
    training = make("train.restarts.number=8", "train.restarts.fraction=0.05", steps=steps).training
    ends = [0, *(end for _, end in rounds(training))]
    assert all(start < end <= steps for start, end in itertools.pairwise(ends))


def test_a_choice_goes_through_with_fewer_steps_than_rounds(make: Make) -> None:
    trainer = make("train.restarts.number=8", "train.restarts.fraction=0.05", steps=2)
    choose(trainer, states_of(trainer))
    assert [one["steps"] for one in trainer.facts["restarts"]["rounds"]] == [1, 2]
    assert trainer.step == 2


def test_a_comparison_at_the_end_leaves_a_whole_run(make: Make) -> None:
    trainer = make("train.restarts.number=3", *HALF)
    assert rounds(trainer.training) == [(3, 3), (2, 6)]
    measured(trainer, [3.0, 1.0, 2.0, 4.0, 3.0])
    choose(trainer, states_of(trainer))
    assert trainer.facts["restarts"]["chosen"] == 2
    newest = load_newest(trainer.run.checkpoints)
    assert newest is not None
    assert newest.step == STEPS
    assert trainer.fit().step == STEPS


@pytest.mark.parametrize("chosen", [0, 1])
def test_it_ends_as_if_it_had_been_the_only_one(make: Make, chosen: int) -> None:
    alone = make()
    alone.set_state(states_of(alone)(chosen), {}, step=0)
    alone.fit()
    of_two = make("train.restarts.number=2", *HALF)
    measured(of_two, [float(number != chosen) for number in range(2)])
    choose(of_two, states_of(of_two))
    of_two.fit()
    assert equal(alone.model.trainable_state(), of_two.model.trainable_state())
    assert [row["loss/total"] for row in rows(alone)] == [row["loss/total"] for row in rows(of_two)]


def test_one_initialisation_is_no_choice(make: Make) -> None:
    trainer = make()
    seen = measured(trainer, [])
    choose(trainer, states_of(trainer))
    assert (trainer.step, seen, trainer.facts) == (0, [], {})


def test_a_share_of_the_steps_too_small_for_one_still_gives_one(make: Make) -> None:
    trainer = make("train.restarts.number=2", "train.restarts.fraction=0.01")
    measured(trainer, [1.0, 2.0])
    choose(trainer, states_of(trainer))
    assert trainer.step == 1


def test_all_losses_are_told_and_kept_in_the_checkpoint(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make("train.restarts.number=3", *HALF)
    measured(trainer, [3.0, 1.0, 2.0, 0.25, 0.5])
    with caplog.at_level(logging.INFO):
        choose(trainer, states_of(trainer))
    assert "losses of 3 initialisations after 3 steps: 3, 1, 2" in caplog.text
    assert "losses of 2 initialisations after 6 steps: 0.25, 0.5" in caplog.text
    checkpoint = load_newest(trainer.run.checkpoints)
    assert checkpoint is not None
    resumed = make("train.restarts.number=3", *HALF)
    resumed.restore(checkpoint)
    assert resumed.facts["restarts"] == {
        "chosen": 1,
        "rounds": [{"steps": 3, "losses": [3.0, 1.0, 2.0]}, {"steps": 6, "losses": [None, 0.25, 0.5]}],
        "steps_of_others": 3 * 3 + 2 * 3 - 6,
    }


def broken(trainer: Trainer, *numbers: int) -> Callable[[int], State]:
    """Initialisations of which some make the loss NaN."""
    states = states_of(trainer)

    def state(number: int) -> State:
        return {
            name: value * (math.nan if number in numbers else 1) for name, value in states(number).items()
        }

    return state


@pytest.mark.parametrize("bad", [0, 1])
def test_one_that_breaks_drops_out(make: Make, caplog: pytest.LogCaptureFixture, bad: int) -> None:
    trainer = make("train.restarts.number=2", *HALF)
    measured(trainer, [5.0])
    choose(trainer, broken(trainer, bad))
    losses: list[float | None] = [5.0, 5.0]
    losses[bad] = None
    assert trainer.facts["restarts"]["rounds"] == [{"steps": 3, "losses": losses}]
    assert trainer.facts["restarts"]["chosen"] == 1 - bad
    assert f"initialisation {bad + 1} drops out: the loss is nan at step 0" in caplog.text
    assert trainer.fit().step == STEPS


def test_one_whose_held_out_loss_overflows_drops_out(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make("train.restarts.number=2", *HALF)
    measured(trainer, [math.nan, 5.0])
    choose(trainer, states_of(trainer))
    assert trainer.facts["restarts"]["chosen"] == 1
    assert "initialisation 1 drops out: the loss on held-out data is nan after step 3" in caplog.text


def test_if_all_break_the_run_fails(make: Make) -> None:
    trainer = make("train.restarts.number=2", *HALF)
    with pytest.raises(TrainingError, match="the loss is nan at step 0"):
        choose(trainer, broken(trainer, 0, 1))
