"""Of several initialisations the one of lowest training loss goes on, as if it had been the only one."""

import contextlib
import itertools
import logging
import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_hydra.checkpoint import load_newest
from spd_hydra.finite import TrainingError
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.replicas import Alone
from spd_hydra.restarts import begin_with_best, rounds
from spd_hydra.run_dir import RunDirectory
from spd_hydra.stop import Stopped
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


# ---- interrupted, and gone on with ---------------------------------------------------------------------

THREE = ("train.restarts.number=3", *HALF)  # of 3 steps each, then 2 of 3 more: 15 steps
ADVERSARY = ("loss.persistent_pgd_recon.coeff=0.5",)
Moments = Sequence[tuple[str, int]]


class Killed(BaseException):
    """Ends a run as a signal that cannot be heard does."""


ENDS: dict[str, type[BaseException]] = {"stopped": Stopped, "killed": Killed}


def interrupt(trainer: Trainer, how: str, at: int) -> list[int]:
    """Ask for a stop during the step of this number, or end before it; the list counts the steps."""
    taken: list[int] = []
    take_step = trainer.train_step

    def step() -> Any:
        if how == "killed" and len(taken) + 1 == at:
            raise Killed
        if how == "stopped" and len(taken) + 1 == at:
            os.kill(os.getpid(), signal.SIGTERM)
        taken.append(trainer.step)
        return take_step()

    trainer.train_step = step  # type: ignore[method-assign]
    return taken


def with_losses_of_its_own(trainer: Trainer) -> Trainer:
    """Let an evaluation be a number that follows from the weights."""

    def evaluate(step: int) -> Evaluation:
        loss = sum(value.double().square().sum().item() for value in trainer.model.trainable_state().values())
        return Evaluation(step=step, n_positions=1, ci_threshold=0.1, metrics={"loss/total": loss}, sites={})

    trainer.evaluate = evaluate
    return trainer


def chosen_after(make: Make, moments: Moments, *words: str) -> tuple[Trainer, int]:
    """A trainer that was interrupted in each attempt, then went on; all steps of the choice."""
    trainer = with_losses_of_its_own(make(*THREE, *ADVERSARY, *words))
    run, steps = trainer.run, 0
    for how, at in [*moments, ("", 0)]:
        trainer = with_losses_of_its_own(make(*THREE, *ADVERSARY, *words))
        trainer.run = run
        run.truncate_metrics(0)
        taken = interrupt(trainer, how, at)
        with pytest.raises(ENDS[how]) if how else contextlib.nullcontext():
            choose(trainer, states_of(trainer))
        steps += len(taken)
    return trainer, steps


def folder(trainer: Trainer) -> Path:
    return trainer.run.path / "restarts"


HISTORIES: list[tuple[Moments, int]] = [  # with the steps that are taken twice
    ([("stopped", 2)], 0),  # in the middle of a part
    ([("stopped", 3)], 0),  # at its end
    ([("killed", 6)], 2),  # at the third step of the second initialisation
    (
        [("stopped", 10), ("killed", 2), ("stopped", 1), ("killed", 1)],
        1,
    ),  # in the second round, again and again
    ([("stopped", 15)], 0),  # at the end of all
]


@pytest.mark.slow
def test_a_choice_that_is_interrupted_anywhere_ends_with_the_same_bits(make: Make) -> None:
    whole, steps = chosen_after(make, [])
    assert steps == 3 * 3 + 2 * 3
    for moments, twice in HISTORIES:
        trainer, taken = chosen_after(make, moments)
        assert taken == steps + twice, moments
        assert trainer.facts == whole.facts, moments
        for own, wanted in zip(trainer.state(), whole.state(), strict=True):
            assert own.keys() == wanted.keys()
            assert equal(own, wanted), moments
        assert trainer.run.read_metrics() == whole.run.read_metrics(), moments
        assert not folder(trainer).exists()


def test_what_is_said_of_a_stop_is_what_was_saved(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make(*THREE)
    interrupt(trainer, "stopped", 4)
    with pytest.raises(Stopped) as stopped:
        choose(trainer, states_of(trainer))
    assert "SIGTERM: stopping after this step to save the choice among initialisations" in caplog.text
    assert str(stopped.value) == "stopped by SIGTERM, saved at step 1 of initialisation 2 of 3"
    assert [path.name for path in folder(trainer).iterdir()] == ["step_4"], "one state at a time"


def test_a_choice_that_is_made_is_a_checkpoint_at_once(make: Make) -> None:
    trainer = make("train.restarts.number=2", *HALF, "train.checkpoint_every=1000")
    choose(trainer, states_of(trainer))
    saved = load_newest(trainer.run.checkpoints)
    assert saved is not None
    assert saved.step == STEPS // 2
    assert equal(saved.tensors["model"], trainer.model.trainable_state())
    assert saved.state["facts"]["restarts"] == trainer.facts["restarts"]
    assert not folder(trainer).exists()


def stopped_at_4(make: Make) -> RunDirectory:
    trainer = make(*THREE)
    interrupt(trainer, "stopped", 4)
    with pytest.raises(Stopped):
        choose(trainer, states_of(trainer))
    return trainer.run


@pytest.mark.parametrize("file", ["state.json", "manifest.json", "run_0_initialisation_1.safetensors"])
def test_a_damaged_state_is_said_and_left_out(
    make: Make, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    run = stopped_at_4(make)
    path = run.path / "restarts" / "step_4" / file
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    trainer = make(*THREE)
    trainer.run = run
    taken = interrupt(trainer, "", 0)
    choose(trainer, states_of(trainer))
    assert f"{path.parent} is damaged: {file}" in caplog.text
    assert "the choice among initialisations begins anew: none of its states is whole" in caplog.text
    assert len(taken) == 15


def test_with_other_settings_a_choice_begins_anew(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    run = stopped_at_4(make)
    trainer = make(*THREE, steps=8)
    trainer.run = run
    taken = interrupt(trainer, "", 0)
    choose(trainer, states_of(trainer))
    assert "the choice among initialisations begins anew: train.steps: 6 → 8" in caplog.text
    assert len(taken) == 3 * 4 + 2 * 4
