"""From a configuration to the objects of a run."""

from collections.abc import Callable

import torch

from spd_hydra.build import Parts, assemble, untrained_target
from spd_hydra.config import RunConfig

Toy = Callable[..., RunConfig]


def built(config: RunConfig) -> Parts:
    return assemble(config, untrained_target(config), torch.device("cpu"))


def test_training_draws_for_active_terms_and_evaluation_for_all_that_are_measured(toy: Toy) -> None:
    parts = built(toy())
    terms = parts.config.loss
    draws = {
        name: parts.objective.columns(chosen).numel()
        for name, chosen in [("train", terms.active_terms()), ("eval", terms.measured_terms())]
    }
    assert parts.train_sampler()(0)[1].shape == (64, draws["train"])
    assert parts.eval_sampler()(0)[1].shape == (64, draws["eval"])
    assert draws["train"] < draws["eval"]


def test_evaluation_data_is_held_out_and_always_the_same(toy: Toy) -> None:
    parts = built(toy())
    held_out = parts.eval_sampler()(0)[0]
    assert torch.equal(held_out, parts.eval_sampler()(0)[0])
    assert not any(torch.equal(held_out, parts.train_sampler()(step)[0]) for step in range(20))


def test_a_term_draws_the_same_in_training_and_evaluation_columns(toy: Toy) -> None:
    # The columns belong to the term, so that switching another term on does not change its masks.
    alone = built(toy("loss.stochastic_recon_layerwise.coeff=0")).train_sampler()
    beside = built(toy("loss.stochastic_recon_layerwise.coeff=1")).train_sampler()
    assert torch.isin(alone.columns, beside.columns).all()
    assert alone.columns.numel() < beside.columns.numel()


def test_ideal_l0_is_features_times_their_probability(toy: Toy) -> None:
    assert built(toy()).ideal_l0() == {"embed": 0.25, "unembed": 0.25}
    hidden = built(toy("model=tms_5-2-id", "decomposition=tms_5-2-id"))
    assert set(hidden.ideal_l0()) == {"embed", "unembed"}


def test_initial_values_depend_on_the_seed_alone(toy: Toy) -> None:
    def initial(seed: int) -> list[torch.Tensor]:
        config = toy(f"seed={seed}")
        torch.manual_seed(seed + 99)
        model = built(config).model
        return [value for _, value in sorted(model.trainable_state().items())]

    same, again, other = initial(3), initial(3), initial(4)
    assert all(torch.equal(a, b) for a, b in zip(same, again, strict=True))
    assert not torch.equal(same[-1], other[-1])
