"""When a run joins what are parts of one subcomponent, alone and as a replica, and after a resume."""

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spd_hydra.build import assemble, device_of, untrained_target
from spd_hydra.checkpoint import load_newest
from spd_hydra.config import RunConfig
from spd_hydra.replicas import Replicas
from spd_hydra.section import ConfigError
from spd_hydra.trainer import Trainer

Make = Callable[..., Trainer]
Toy = Callable[..., RunConfig]
WORDS = ["~decomposition.tied.unembed", "train.faithfulness_warmup.steps=0", "train.checkpoint_every=3"]


def halve(trainer: Trainer) -> Trainer:
    """Let the first subcomponent of `embed` be in two halves, all with a causal importance near 1."""
    pieces = trainer.model.pieces("embed")
    with torch.no_grad():
        pieces.V[:, 1], pieces.U[1] = pieces.V[:, 0], pieces.U[0]
        for parameter in trainer.updates.ci_fn:
            parameter.fill_(1)
    return trainer


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.trainable_state().items()}


def evenness(trainer: Trainer) -> float:
    """Of the two halves of `embed`, the norm of U_c V_c of the smaller over that of the larger."""
    pieces = trainer.model.pieces("embed")
    sizes = pieces.V[:, :2].norm(dim=0) * pieces.U[:2].norm(dim=1)
    return float((sizes.min() / sizes.max()).detach())


def test_it_joins_after_every_such_fraction_of_training_but_the_last(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = halve(make(*WORDS, "train.join_every=0.34"))
    with caplog.at_level(logging.INFO):
        for step in range(1, 7):
            trainer.train_step()
            if step == 1:
                assert evenness(trainer) > 0.8
            if step == 2:
                assert evenness(trainer) < 0.1
            if step == 5:
                halve(trainer)
    told = {m.split(":")[0]: m for m in caplog.messages if "joined" in m}
    assert "embed: 1 into 0" in told["step 2"] or "embed: 0 into 1" in told["step 2"]
    assert told.keys() <= {
        "step 2",
        "step 4",
    }  # 6 is the end; of 20 others in two dimensions some may be near


def test_a_fraction_of_less_than_a_step_is_every_step(make: Make) -> None:
    trainer = halve(make(*WORDS, "train.join_every=0.01"))
    trainer.train_step()
    assert evenness(trainer) < 0.1


def test_by_default_nothing_is_joined(make: Make) -> None:
    trainer = halve(make(*WORDS))
    trainer.fit()
    assert evenness(trainer) > 0.8


def test_a_run_that_is_resumed_after_a_join_ends_with_the_same_bits(make: Make) -> None:
    whole = halve(make(*WORDS, "train.join_every=0.5"))
    whole.fit()
    first = halve(make(*WORDS, "train.join_every=0.5"))
    for _ in range(3):
        first.record(first.train_step())
    again = make(*WORDS, "train.join_every=0.5")
    checkpoint = load_newest(first.run.checkpoints)
    assert checkpoint is not None
    assert checkpoint.step == 3
    again.restore(checkpoint)
    again.fit()
    for name, value in weights(whole).items():
        assert torch.equal(weights(again)[name], value), name


def test_each_replica_joins_what_it_would_join_alone(make: Make) -> None:
    words = [*WORDS, "train.join_every=0.34"]
    trainers = [halve(make(*words, "train.replicas=2", f"seed={seed}")) for seed in range(2)]
    group = Replicas(trainers)
    group.begin()
    for _ in range(3):
        group.train_step()
    for seed, trainer in enumerate(trainers):
        alone = halve(make(*words, f"seed={seed}"))
        for _ in range(3):
            alone.train_step()
        assert evenness(trainer) < 0.3  # one step after
        for name, value in weights(alone).items():
            torch.testing.assert_close(weights(trainer)[name], value, atol=1e-4, rtol=1e-3)


def test_text_is_refused(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy("train.join_every=0.1")
    monkeypatch.setattr("spd_hydra.data.sparse_features.SparseFeatureBatches.ordered", True, raising=False)
    with pytest.raises(
        ConfigError, match=r"^train\.join_every: got 0\.1, must be 0 with data that are read in"
    ):
        assemble(config, untrained_target(config), device_of(config))
