"""CUDA graphs on a GPU: the numbers of a launched step, no waiting, and what a failed recording does."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from spd_hydra.config import RunConfig
from spd_hydra.graph import REHEARSALS
from spd_hydra.replicas import Replicas
from spd_hydra.run import run
from spd_hydra.trainer import Trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

Make = Callable[..., Trainer]
Toy = Callable[..., RunConfig]
STEPS = 40
GPU = (
    "device=cuda",
    "train.compile=true",
    "train.log_every=10",
    "eval.every=100",
    "train.checkpoint_every=100",
)
ANNEALED_AND_CLIPPED = (
    "loss.importance_minimality={p_end:0.5,squeeze:3.0,squeeze_from:0.3,squeeze_to:0.6}",
    "train.clip_components=0.01",
    "train.clip_ci_fn=0.02",
)


@pytest.fixture
def never_waits() -> Iterator[Callable[[], None]]:
    """Makes whatever waits for the device an error, until the end of the test."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def is_recorded(owner: Any) -> bool:
    graph = owner._graph
    return graph is not None and graph._compute.is_recorded and graph._update.is_recorded


def assert_close(trainer: Trainer, wanted: Trainer) -> None:
    for own, other in zip(trainer.state(), wanted.state(), strict=True):
        assert own.keys() == other.keys()
        for name, value in other.items():
            torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-5)
    rows, wanted_rows = trainer.run.read_metrics(), wanted.run.read_metrics()
    assert len(rows) == len(wanted_rows) > 0
    for row, other_row in zip(rows, wanted_rows, strict=True):
        assert row == pytest.approx(other_row, rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("words", [(), ANNEALED_AND_CLIPPED, ("ci_fn=shared_mlp", "ci_fn.hidden=[8]")])
def test_a_replayed_training_has_the_numbers_of_a_launched_one(make: Make, words: tuple[str, ...]) -> None:
    trainers = [make(*GPU, *words, f"train.cuda_graphs={on}", steps=STEPS) for on in ("false", "true")]
    for trainer in trainers:
        trainer.fit()
    launched, replayed = trainers
    assert is_recorded(replayed)
    assert launched._graph is None
    assert_close(replayed, launched)


def test_replayed_replicas_have_the_numbers_of_launched_ones(make: Make) -> None:
    trainers = [
        [
            make(*GPU, *ANNEALED_AND_CLIPPED, f"train.cuda_graphs={on}", f"seed={s}", steps=STEPS)
            for s in range(3)
        ]
        for on in ("false", "true")
    ]
    groups = [Replicas(own) for own in trainers]
    for group in groups:
        group.fit()
    assert is_recorded(groups[1])
    for own, wanted in zip(trainers[1], trainers[0], strict=True):
        assert_close(own, wanted)


def test_other_work_on_the_device_does_not_disturb_a_recording(make: Make) -> None:
    trainers = [make(*GPU, f"train.cuda_graphs={on}", steps=STEPS) for on in ("false", "true")]
    for trainer in trainers:
        for step in range(20):
            trainer.train_step()
            with torch.no_grad():  # as an evaluation does, between any two steps
                trainer.objective(*trainer.sampler(step), trainer.objective.scheduled(0.0))
            torch.cuda.empty_cache()
            torch.randn(2**22, device="cuda").sum().item()
    for name, value in trainers[0].model.trainable_state().items():
        torch.testing.assert_close(trainers[1].model.trainable_state()[name], value, rtol=1e-3, atol=1e-5)


def test_a_step_that_is_not_recorded_in_the_log_never_waits(
    make: Make, never_waits: Callable[[], None]
) -> None:
    words = (
        "device=cuda",
        "train.compile=true",
        "train.log_every=1000",
        "eval.every=1000",
        *ANNEALED_AND_CLIPPED,
    )
    trainer = make(*words, steps=1000)
    group = Replicas([make(*words, f"seed={seed}", steps=1000) for seed in range(2)])
    group.begin()
    for _ in range(REHEARSALS + 2):
        trainer.train_step()
        group.train_step()
    assert is_recorded(trainer)
    assert is_recorded(group)
    never_waits()
    for _ in range(20):
        trainer.train_step()
        group.train_step()


def test_a_launched_compiled_step_never_waits_either(make: Make, never_waits: Callable[[], None]) -> None:
    words = (
        "device=cuda",
        "train.compile=true",
        "train.log_every=1000",
        "eval.every=1000",
        *ANNEALED_AND_CLIPPED,
    )
    trainer = make(*words, "train.cuda_graphs=false", steps=1000)
    for _ in range(2):
        trainer.train_step()
    never_waits()
    for _ in range(20):
        trainer.train_step()


def test_a_recorded_training_goes_on_from_another_state(make: Make) -> None:
    other = make(*GPU, "seed=5", "train.cuda_graphs=false", steps=STEPS)
    for _ in range(4):
        other.train_step()
    state = [{name: value.clone() for name, value in part.items()} for part in other.state()]
    trainers = [make(*GPU, f"train.cuda_graphs={on}", steps=STEPS) for on in ("false", "true")]
    for trainer in trainers:
        for _ in range(REHEARSALS + 3):
            trainer.train_step()
        trainer.set_state(state[0], state[1], step=4)
        for _ in range(5):
            trainer.train_step()
    assert is_recorded(trainers[1])
    for own, wanted in zip(trainers[1].state(), trainers[0].state(), strict=True):
        for name, value in wanted.items():
            torch.testing.assert_close(own[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("broken", ["loss", "update"])
def test_a_recording_that_fails_changes_nothing_and_is_told(
    make: Make, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    launched = make(*GPU, "train.cuda_graphs=false", steps=STEPS)
    launched.fit()
    trainer = make(*GPU, steps=STEPS)
    owner, name = (trainer.sampler, "draw") if broken == "loss" else (trainer, "_update")
    work = getattr(owner, name)

    def waiting(*arguments: Any) -> Any:
        trainer.updates.components[0].sum().item()  # which cannot be recorded
        return work(*arguments)

    setattr(owner, name, waiting)
    trainer.fit()
    assert not is_recorded(trainer)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "spd_hydra.graph"]
    assert line.startswith(f"the {broken} cannot be recorded as a CUDA graph")
    assert_close(trainer, launched)


def test_an_uncompiled_step_is_launched_and_says_so(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    trainer = make("device=cuda", "train.compile=false")
    with caplog.at_level(logging.INFO):
        trainer.train_step()
    assert trainer._graph is None
    assert "not replayed as a CUDA graph: it is not compiled" in caplog.text


def test_a_whole_run_with_restarts_ends_as_the_launched_one(toy: Toy) -> None:
    words = (*GPU, "train.steps=60", "train.restarts.number=3", "eval.every=30")
    outcomes = [run(toy(*words, f"train.cuda_graphs={on}")) for on in ("false", "true")]
    assert outcomes[1].summary["losses"] == pytest.approx(outcomes[0].summary["losses"], rel=1e-2, abs=1e-6)
