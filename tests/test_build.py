"""From a configuration to the objects of a run."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from spd_hydra.build import Parts, assemble, preflight, untrained_target
from spd_hydra.config import RunConfig
from spd_hydra.model.base import TargetSpec
from spd_hydra.section import ConfigError

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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decomposition.sites.embed.pattern=nowhere"], "nowhere"),
        (["model=tms_5-2", "decomposition=resid_mlp1"], "mlp_in"),
        (["decomposition.tied={embed:embed}"], "embed"),
    ],
    ids=["no such site", "sites of another target", "tied to itself"],
)
def test_what_does_not_fit_the_target_is_refused_by_name(
    toy: Toy, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(toy(*overrides))


def test_a_check_before_training_makes_no_weights(toy: Toy) -> None:
    parts = preflight(
        toy("decomposition.sites.embed.C=1000000000", "decomposition.sites.unembed.C=1000000000")
    )
    assert {parameter.device.type for parameter in parts.model.parameters()} == {"meta"}
    assert parts.model.site_shapes()["embed"].C == 1_000_000_000


def test_a_target_that_needs_values_is_checked_with_them(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy()
    build = type(config.model).build

    def with_values(spec: TargetSpec, generator: torch.Generator) -> nn.Module:
        module = build(spec, generator)
        assert next(module.parameters()).norm().item() > 0
        return module

    monkeypatch.setattr(type(config.model), "build", with_values)
    assert {p.device.type for p in preflight(config).model.parameters()} == {"cpu"}
    with pytest.raises(ConfigError, match="nowhere"):
        preflight(toy("decomposition.sites.embed.pattern=nowhere"))


def test_a_large_target_that_needs_values_is_refused_without_making_them(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2**15, 2**13, bias=False)  # 1 GiB
            self.unembed = nn.Linear(4, 4, bias=False)
            self.bias = nn.Parameter(torch.zeros(1))
            made.append(self.embed.weight.device.type)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            assert self.bias.item() == 0
            return batch

    config = toy("decomposition=tms_5-2-untied")
    monkeypatch.setattr(type(config.model), "build", lambda spec, generator: Wide())
    with pytest.raises(ConfigError) as caught:
        preflight(config)
    message = str(caught.value)
    assert re.match(
        r"model: \S+ cannot be checked without the values of its weights \(RuntimeError: ", message
    )
    assert message.endswith(
        "), which are 1.0 GiB; up to 1 GiB are made for a check. Try a small model of the same kind"
    )
    assert "\n" not in message
    assert set(made) == {"meta"}
