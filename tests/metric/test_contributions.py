"""Neuron contributions of hand-made decompositions of a small residual MLP."""

import numpy as np
import pytest
import torch

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.metric.contributions import agreement, agreement_metrics, neuron_contributions
from spd_hydra.metric.evaluation import NeuronContributions
from spd_hydra.model.resid_mlp import ResidMLP
from spd_hydra.model.tms import TMS

N_FEATURES, D_EMBED, D_MLP, C = 4, 9, 3, 6


def decomposed(n_layers: int = 1, pattern: str = "layers.*.mlp_in") -> DecomposedModel:
    spec = ResidMLP(n_features=N_FEATURES, d_embed=D_EMBED, d_mlp=D_MLP, n_layers=n_layers)
    return DecomposedModel(
        spec.build(torch.Generator().manual_seed(1)),
        Decomposition(sites={"site": SitePattern(pattern=pattern, C=C)}),
        MLPCausalImportance(hidden=2),
        seed=0,
    )


def set_perfect(model: DecomposedModel, site: str, scale: float = 1.0) -> None:
    """Piece c reads feature c alone (dual basis of the embedding) and writes what the matrix makes of it."""
    embed = model.target.get_buffer("W_E")
    with torch.no_grad():
        for parameter in model.pieces(site).parameters():
            parameter.zero_()
        model.pieces(site).V[:, :N_FEATURES] = torch.linalg.pinv(embed)
        model.pieces(site).U[:N_FEATURES] = scale * (embed @ model.weight(site).T)


def test_the_target_s_contributions_are_those_of_the_formula() -> None:
    model = decomposed()
    embed = model.target.get_buffer("W_E").numpy()
    W_in = model.weight("layers.0.mlp_in").numpy()
    W_out = model.target.get_parameter("layers.0.mlp_out.weight").detach().numpy()
    (found,) = neuron_contributions(model)
    assert found.layer == "layers.0"
    for feature in range(N_FEATURES):
        for neuron in range(D_MLP):
            by_hand = (embed[feature] @ W_out[:, neuron]) * (W_in[neuron] @ embed[feature])
            assert found.target[feature, neuron] == pytest.approx(by_hand, abs=1e-6)


def test_a_perfect_decomposition_lies_on_the_diagonal_with_both_signs() -> None:
    model = decomposed()
    set_perfect(model, "layers.0.mlp_in")
    (found,) = neuron_contributions(model)
    assert found.target.min() < 0 < found.target.max()
    np.testing.assert_allclose(found.subcomponents, found.target, atol=1e-5)


def test_pieces_of_half_the_size_lie_on_a_line_of_half_the_slope() -> None:
    model = decomposed()
    set_perfect(model, "layers.0.mlp_in", scale=0.5)
    (found,) = neuron_contributions(model)
    np.testing.assert_allclose(found.subcomponents, 0.5 * found.target, atol=1e-5)


def test_a_feature_split_over_two_pieces_counts_only_the_stronger() -> None:
    model = decomposed()
    site = "layers.0.mlp_in"
    set_perfect(model, site)
    with torch.no_grad():
        model.pieces(site).V[:, 4] = model.pieces(site).V[:, 0]
        model.pieces(site).U[4] = 0.25 * model.pieces(site).U[0]
        model.pieces(site).U[0] *= 0.75
    (found,) = neuron_contributions(model)
    np.testing.assert_allclose(found.subcomponents[0], 0.75 * found.target[0], atol=1e-5)
    np.testing.assert_allclose(found.subcomponents[1:], found.target[1:], atol=1e-5)


def test_every_layer_whose_input_matrix_is_decomposed_is_listed() -> None:
    assert [c.layer for c in neuron_contributions(decomposed(n_layers=2))] == ["layers.0", "layers.1"]
    only_last = decomposed(n_layers=2, pattern="layers.1.mlp_*")
    assert [c.layer for c in neuron_contributions(only_last)] == ["layers.1"]


def test_other_targets_have_none() -> None:
    target = TMS(n_features=3).build(torch.Generator().manual_seed(0))
    model = DecomposedModel(
        target,
        Decomposition(sites={"embed": SitePattern(pattern="embed", C=4)}),
        MLPCausalImportance(hidden=2),
        seed=0,
    )
    assert neuron_contributions(model) == []


def layer(target: np.ndarray, subcomponents: np.ndarray, name: str = "layers.0") -> NeuronContributions:
    return NeuronContributions(layer=name, target=target, subcomponents=subcomponents)


def test_agreement_of_a_shrunk_copy_is_known_by_hand() -> None:
    x = np.array([[0.0, 1.0], [2.0, 3.0]])
    r_squared, slope = agreement(layer(x, 0.5 * x))
    assert slope == pytest.approx(0.5)
    assert r_squared == pytest.approx(1 - (0.25 + 1 + 2.25) / 1.25)


def test_agreement_with_itself_is_perfect_and_with_a_constant_undefined() -> None:
    x = np.arange(6.0).reshape(2, 3)
    assert agreement(layer(x, x)) == pytest.approx((1.0, 1.0))
    assert np.isnan(agreement(layer(x, np.zeros_like(x)))).all()


def test_every_layer_has_two_metrics() -> None:
    x = np.array([[0.0, 1.0], [2.0, 3.0]])
    assert agreement_metrics([layer(x, x), layer(x, 0.5 * x, "layers.1")]) == pytest.approx(
        {
            "recovery/neuron_r2/layers.0": 1.0, "recovery/neuron_slope/layers.0": 1.0,
            "recovery/neuron_r2/layers.1": 1 - 3.5 / 1.25, "recovery/neuron_slope/layers.1": 0.5,
        }
    )  # fmt: skip
    assert agreement_metrics([]) == {}
