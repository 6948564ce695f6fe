"""TMS targets: what they compute, how the tie survives, what certifies them, the known answer."""

import copy
import math

import pytest
import torch
from torch import nn

from spd_hydra import rng
from spd_hydra.model.tms import TMS, BiasInit, TMSModel


def polygon(n_features: int, norm: float = 1.0, turn: float = 0.3) -> TMSModel:
    """A TMS with unit columns on a regular polygon and a bias that cancels the neighbours."""
    angles = turn + 2 * math.pi * torch.arange(n_features) / n_features
    weight = norm * torch.stack([angles.cos(), angles.sin()])
    return TMSModel(weight, torch.full((n_features,), -0.2), 0)


def measured(spec: TMS, module: nn.Module) -> dict[str, bool]:
    return {m.name: m.passed for m in spec.certify(module)}


@pytest.mark.parametrize("n_hidden_layers", [0, 1])
def test_output_is_relu_of_gram_matrix_times_input_plus_bias(n_hidden_layers: int) -> None:
    module = TMS(n_features=4, n_hidden=3, n_hidden_layers=n_hidden_layers).build(rng.generator(0, "t"))
    W, b = module.embed.weight, module.unembed.bias
    x = torch.linspace(-1, 1, 12).reshape(3, 4)
    expected = torch.stack([torch.relu(W.T @ (W @ row) + b) for row in x])
    torch.testing.assert_close(module(x), expected)


def test_embed_and_unembed_are_one_parameter_listed_once() -> None:
    module = TMS().build(rng.generator(0, "t"))
    assert [name for name, _ in module.named_parameters()] == ["embed.weight", "unembed.bias"]
    assert module.unembed.shared is module.embed.weight
    assert torch.equal(module.unembed.weight, module.embed.weight.T)


def test_a_deep_copy_keeps_the_tie_and_its_distance_from_the_original() -> None:
    module = TMS().build(rng.generator(0, "t"))
    clone = copy.deepcopy(module)
    assert clone.unembed.shared is clone.embed.weight
    assert clone.embed.weight is not module.embed.weight


def test_a_deep_copy_that_shares_parameters_shares_the_tied_one() -> None:
    module = TMS().build(rng.generator(0, "t"))
    clone = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    assert clone.unembed.shared is clone.embed.weight is module.embed.weight


def test_a_change_of_precision_keeps_the_tie() -> None:
    module = TMS().build(rng.generator(0, "t")).double()
    assert module.unembed.shared is module.embed.weight
    assert module.unembed.weight.dtype == torch.float64


def test_functional_calls_replace_both_ends_of_the_tie() -> None:
    module = TMS().build(rng.generator(0, "t"))
    replaced = {"embed.weight": torch.ones(2, 5), "unembed.bias": torch.zeros(5)}
    output = torch.func.functional_call(module, replaced, torch.ones(1, 5))
    assert torch.equal(output, torch.full((1, 5), 10.0))


def test_the_identity_layer_is_never_trained() -> None:
    module = TMS(n_hidden=3, n_hidden_layers=1).build(rng.generator(0, "t"))
    assert torch.equal(module.hidden[0].weight, torch.eye(3))
    assert not module.hidden[0].weight.requires_grad


def test_building_leaves_the_global_generator_alone_and_depends_on_the_given_one() -> None:
    before = torch.get_rng_state()
    first, again, other = (TMS().build(rng.generator(seed, "t")).embed.weight for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bias_starts_at_zero_where_asked() -> None:
    zero = TMS(bias_init=BiasInit.zero).build(rng.generator(0, "t")).unembed.bias
    uniform = TMS(bias_init=BiasInit.uniform).build(rng.generator(0, "t")).unembed.bias
    assert not zero.any()
    assert uniform.all()
    assert uniform.abs().max() <= 1 / math.sqrt(2)


def test_training_loss_is_the_mean_over_all_elements() -> None:
    module = TMSModel(torch.zeros(2, 2), torch.tensor([1.0, -1.0]), 0)  # always outputs (1, 0)
    loss = TMS(n_features=2).training_loss(module, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert loss.item() == pytest.approx((0 + 4 + 1 + 0) / 4)


def test_a_regular_pentagon_is_certified() -> None:
    assert measured(TMS(), polygon(5)) == {
        "margin": True,
        "response": True,
        "norm_deviation": True,
        "angle_deviation": True,
    }


def test_a_feature_that_is_not_represented_is_found() -> None:
    module = polygon(5)
    with torch.no_grad():
        module.embed.weight[:, 2] = 0
    found = measured(TMS(), module)
    assert not found["margin"]
    assert not found["response"]


def test_one_column_ten_percent_longer_fails_only_the_norms() -> None:
    module = polygon(5)
    with torch.no_grad():
        module.embed.weight[:, 2] *= 1.1
    assert [name for name, passed in measured(TMS(), module).items() if not passed] == ["norm_deviation"]


@pytest.mark.parametrize(("degrees", "passed"), [(2.5, True), (3.5, False)])
def test_a_turned_column_passes_within_three_degrees(degrees: float, passed: bool) -> None:
    module = polygon(5)
    angle = math.radians(degrees)
    turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    with torch.no_grad():
        module.embed.weight[:, 2] = turn @ module.embed.weight[:, 2]
    assert measured(TMS(), module)["angle_deviation"] is passed


def test_angles_are_not_asked_of_more_than_two_dimensions() -> None:
    spec = TMS(n_features=4, n_hidden=3)
    assert set(measured(spec, spec.build(rng.generator(0, "t")))) == {"margin", "response"}


def test_a_weak_response_is_found() -> None:
    # response = norm² - 0.2 / 0.75
    assert measured(TMS(), polygon(5, norm=0.88))["response"]
    assert not measured(TMS(), polygon(5, norm=0.87))["response"]


def test_a_target_of_nans_is_not_certified() -> None:
    module = polygon(5)
    with torch.no_grad():
        module.embed.weight.fill_(math.nan)
    assert not any(measured(TMS(), module).values())


def test_known_answer_names_sites_of_the_module() -> None:
    spec = TMS(n_features=40, n_hidden=10, n_hidden_layers=1)
    module = spec.build(rng.generator(0, "t"))
    answer = spec.known_answer(module)
    assert answer.identity == {"embed": 40, "unembed": 40}
    assert answer.dense == {"hidden.0": 10}
    assert answer.expected_alive == {"embed": 40, "unembed": 40, "hidden.0": 10}
    assert torch.equal(answer.probe, 0.75 * torch.eye(40))
    assert torch.equal(answer.directions["embed"] @ module.embed.weight.T, module.embed.weight.T)
    assert answer.cosine_decides
    assert all(module.get_submodule(site) is not None for site in answer.expected_alive)
