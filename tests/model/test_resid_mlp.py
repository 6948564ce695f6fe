"""Residual MLP targets: what they compute, the folded form, what certifies them, the known answer."""

import pytest
import torch
from torch import Tensor

from spd_hydra import rng
from spd_hydra.model.resid_mlp import MLPLayer, ResidMLP, ResidMLPModel


def exact(n_features: int, d_embed: int) -> ResidMLPModel:
    """x + ReLU(x) without error: orthogonal embedding, one neuron per feature."""
    W_E = torch.eye(d_embed)[:n_features]
    return ResidMLPModel(W_E, [MLPLayer(W_E.clone(), W_E.T.clone())])


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_output_is_the_unembedded_residual_stream(n_layers: int) -> None:
    module = ResidMLP(n_features=6, d_embed=11, d_mlp=4, n_layers=n_layers).build(rng.generator(0, "t"))
    x = torch.linspace(-1, 1, 12).reshape(2, 6)

    def by_hand(row: Tensor) -> Tensor:
        residual = sum(row[j] * module.W_E[j] for j in range(6))
        for layer in module.layers:
            neurons = torch.relu(layer.mlp_in.weight @ residual)
            residual = residual + layer.mlp_out.weight @ neurons
        return torch.stack([module.W_E[j] @ residual for j in range(6)])

    torch.testing.assert_close(module(x), torch.stack([by_hand(row) for row in x]))


@pytest.mark.parametrize("n_layers", [1, 2, 3])
def test_the_folded_form_is_the_plain_forward_pass(n_layers: int) -> None:
    module = (
        ResidMLP(n_features=6, d_embed=50, d_mlp=4, n_layers=n_layers).build(rng.generator(0, "t")).double()
    )
    x = 2 * torch.rand(20, 6, generator=rng.generator(0, "x"), dtype=torch.float64) - 1
    torch.testing.assert_close(module.folded(x), module(x))


def test_the_embedding_has_unit_rows_and_is_not_trained() -> None:
    module = ResidMLP(n_features=6, d_embed=50).build(rng.generator(0, "t"))
    torch.testing.assert_close(module.W_E.norm(dim=1), torch.ones(6))
    assert torch.equal(module.W_U, module.W_E.T)
    assert [name for name, _ in module.named_parameters()] == [
        "layers.0.mlp_in.weight",
        "layers.0.mlp_out.weight",
    ]
    assert "W_E" in module.state_dict()


def test_each_seed_has_its_own_embedding() -> None:
    first, again, other = (ResidMLP(n_features=6).build(rng.generator(seed, "t")).W_E for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_labels_are_x_plus_relu_of_x() -> None:
    spec = ResidMLP(n_features=4, d_embed=8)
    x = torch.tensor([[0.5, -0.5, 0.0, 1.0]])
    assert spec.training_loss(exact(4, 8), x).item() == pytest.approx(0, abs=1e-12)
    idle = ResidMLPModel(torch.eye(8)[:4], [MLPLayer(torch.zeros(3, 8), torch.zeros(8, 3))])
    assert spec.training_loss(idle, x).item() == pytest.approx((0.25 + 0 + 0 + 1) / 4)


def test_certification_measures_response_and_interference() -> None:
    spec = ResidMLP(n_features=4, d_embed=8, min_response=0.5, max_interference=0.2)
    module = exact(4, 8)
    with torch.no_grad():
        module.layers[0].mlp_out.weight[2] *= 0.4  # feature 2 gets 40 % of its ReLU
        module.layers[0].mlp_out.weight[1, 3] = -0.25  # feature 3 takes a quarter from feature 1
    found = {m.name: m for m in spec.certify(module)}
    assert found["response"].value == pytest.approx(0.4)
    assert not found["response"].passed
    assert found["interference"].value == pytest.approx(0.25)
    assert not found["interference"].passed
    assert all(m.passed for m in spec.certify(exact(4, 8)))


def test_certification_measures_the_least_that_a_layer_adds_for_a_feature() -> None:
    spec = ResidMLP(n_features=4, d_embed=8, n_layers=2, min_layer_effect=0.1)
    W_E = torch.eye(8)[:4]
    # What each layer adds to the outputs for a lone feature (row) of size 1.
    first = torch.tensor([[0.5, 0, 0, 0], [0, 0.7, 0, 0], [0, 0, 0.03, 0.04], [0, 0, 0, 0.2]])
    second = torch.tensor([[0.3, 0, 0, 0], [0, 0.3, 0, 0], [0, 0, 0.7, 0], [0, 0, 0, 0.3]])

    def module(first: Tensor) -> ResidMLPModel:
        read = torch.eye(4) + first  # by the second layer
        return ResidMLPModel(
            W_E,
            [
                MLPLayer(W_E.clone(), W_E.T @ first.T),
                MLPLayer(W_E.clone(), W_E.T @ torch.linalg.solve(read, second).T),
            ],
        )

    effect = {m.name: m for m in spec.certify(module(first))}["layer_effect"]
    assert effect.value == pytest.approx(0.05)  # feature 2 in the first layer: 3-4-5
    assert not effect.passed
    first[2] *= 3
    assert {m.name: m for m in spec.certify(module(first))}["layer_effect"].passed


def test_certification_counts_neurons_that_no_feature_turns_on() -> None:
    spec = ResidMLP(n_features=4, d_embed=8, max_idle_neurons=1)
    module = exact(4, 8)
    assert {m.name: m.value for m in spec.certify(module)}["idle_neurons"] == 0
    with torch.no_grad():
        module.layers[0].mlp_in.weight[1] *= -1  # on for negative values of feature 1 alone
        module.layers[0].mlp_in.weight[3] = 0
    found = {m.name: m for m in spec.certify(module)}["idle_neurons"]
    assert found.value == 2
    assert not found.passed
    assert all(m.passed for m in ResidMLP(n_features=4, d_embed=8).certify(module) if m.name == found.name)


def test_known_answer_names_sites_of_the_module() -> None:
    spec = ResidMLP(n_features=6, d_embed=11, d_mlp=4, n_layers=2)
    module = spec.build(rng.generator(0, "t"))
    answer = spec.known_answer(module)
    assert answer.identity == {"layers.0.mlp_in": 6, "layers.1.mlp_in": 6}
    assert answer.dense == {"layers.0.mlp_out": 4, "layers.1.mlp_out": 4}
    assert answer.expected_alive == answer.identity | answer.dense
    assert torch.equal(answer.probe, 0.75 * torch.eye(6))
    assert not answer.cosine_decides
    for site, directions in answer.directions.items():
        layer = module.get_submodule(site)
        arriving = torch.stack([layer(row) for row in module.W_E])
        torch.testing.assert_close(directions @ layer.weight.T, arriving)
    assert all(module.get_submodule(site) is not None for site in answer.expected_alive)
