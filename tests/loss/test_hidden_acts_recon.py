"""Reconstruction of site outputs against numbers worked out by hand (the model: see conftest.py)."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.loss.hidden_acts_recon import HiddenActsRecon
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective
from spd_hydra.precision import Precision

MakeModel = Callable[..., DecomposedModel]
# As in test_terms.py: a' = (3/4, 25/16), m_b = 5/8, δ_b = 1/4
DRAWS = torch.tensor([[0.5, 0.25, 0.75, 0.5, 0.25]])
EXACT = torch.ones(1, 5)


def value(model: DecomposedModel, term: HiddenActsRecon, batch: Tensor, draws: Tensor) -> float:
    objective = Objective(model, LossSet(), precision=Precision.fp32, ci_threshold=0.1)
    found = objective.statistics(objective.inputs(batch), {"term": term}, draws, {})["term"]
    return term.value(found, 1).item()


def by_hand() -> float:
    at_a = ((3 / 4 - 1) ** 2 + (25 / 16 - 2) ** 2) / 2
    at_b = ((5 / 8 * (3 / 4 + 25 / 16) - 3) ** 2 + (25 / 64 - 2) ** 2) / 2
    return (at_a + at_b) / 2


def test_it_is_the_mean_over_sites_of_the_mean_squared_error_of_their_outputs(hand_made: MakeModel) -> None:
    assert value(hand_made(), HiddenActsRecon(), torch.ones(1, 2), DRAWS) == pytest.approx(by_hand())


def test_it_is_a_mean_over_positions_and_draws(hand_made: MakeModel) -> None:
    # masks of ones with the whole delta leave every output as it is
    rows = value(hand_made(), HiddenActsRecon(), torch.ones(2, 2), torch.cat([DRAWS, EXACT]))
    assert rows == pytest.approx(by_hand() / 2)
    draws = torch.cat([DRAWS, EXACT], dim=1)
    assert value(hand_made(), HiddenActsRecon(n_samples=2), torch.ones(1, 2), draws) == pytest.approx(rows)


def test_a_wide_site_counts_as_much_as_a_narrow_one(chain: MakeModel) -> None:
    model, generator = chain(), torch.Generator().manual_seed(1)
    batch, draws = torch.randn(6, 5, generator=generator), torch.rand(6, 21, generator=generator)
    errors = []
    x = wanted = batch
    for site, r in zip(model.site_names, draws.split([7, 4, 10], dim=1), strict=True):
        layer, pieces = model.target.get_submodule(site), model.pieces(site)
        g = model.causal_importances(batch)[site].lower
        delta = (layer.weight.T - pieces.V @ pieces.U).detach()
        y = (x @ pieces.V * (g + (1 - g) * r[:, :-1])) @ pieces.U + r[:, -1:] * (x @ delta)
        y = y + layer.bias if site != "second" else y
        errors.append((y - layer(wanted)).square().mean().item())
        x, wanted = torch.relu(y), torch.relu(layer(wanted))
    assert value(model, HiddenActsRecon(), batch, draws) == pytest.approx(sum(errors) / 3, rel=1e-5)
