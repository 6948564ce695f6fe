"""Smooth L0 against numbers worked out by hand: causal importances (1/2, 3/4) at `a`, 1/4 at `b`."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective
from spd_hydra.loss.smooth_l0 import SmoothL0
from spd_hydra.precision import Precision
from spd_hydra.section import ConfigError

MakeModel = Callable[..., DecomposedModel]


def value(model: DecomposedModel, term: SmoothL0, batch: Tensor, gamma: float, reference: int = 1) -> float:
    objective = Objective(model, LossSet(), precision=Precision.fp32, ci_threshold=0.1)
    schedule = {"term": {"gamma": torch.tensor(gamma)}}
    draws = torch.zeros(len(batch), 0)
    found = objective.statistics(objective.inputs(batch), {"term": term}, draws, schedule)["term"]
    return term.value(found, reference).item()


# ψ at γ = 1/2: 1/4 / (1/4 + 1/4), 9/16 / (9/16 + 4/16), 1/16 / (1/16 + 4/16)
F = (1 / 2, 9 / 13, 1 / 5)


def test_it_sums_soft_counts_over_sites_and_subcomponents(hand_made: MakeModel) -> None:
    assert value(hand_made(), SmoothL0(), torch.ones(3, 2), 0.5) == pytest.approx(sum(F), rel=1e-6)


def test_for_a_small_gamma_it_is_l0(hand_made: MakeModel) -> None:
    model = hand_made()
    with torch.no_grad():
        model.get_parameter("ci_fn.sites.a.b_out").copy_(torch.tensor([-1.0, 0.75]))
    assert value(model, SmoothL0(), torch.ones(3, 2), 1e-4) == pytest.approx(2, rel=1e-6)


def test_the_frequency_term_does_not_depend_on_the_size_of_a_batch(hand_made: MakeModel) -> None:
    term = SmoothL0(frequency_coeff=0.5, frequency_scale=30)
    expected = sum(f + 0.5 * f * math.log2(1 + 30 * f) for f in F)
    for rows, reference in ((1, 1), (7, 7), (7, 1000)):
        found = value(hand_made(), term, torch.ones(rows, 2), 0.5, reference)
        assert found == pytest.approx(expected, rel=1e-6)


def test_it_uses_the_upper_function(hand_made: MakeModel) -> None:
    model = hand_made()
    with torch.no_grad():
        model.get_parameter("ci_fn.sites.a.b_out").copy_(torch.tensor([-3.0, 2.0]))
    expected = 0 + 1.01**2 / (1.01**2 + 1 / 4) + 1 / 5
    assert value(model, SmoothL0(), torch.ones(1, 2), 0.5) == pytest.approx(expected, rel=1e-6)


def test_gamma_is_linear_between_two_fractions_of_training() -> None:
    term = SmoothL0(anneal_from=0.25, anneal_to=0.75)
    assert [term.gamma(t) for t in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx([1, 1, 0.505, 0.01, 0.01])
    assert term.scheduled(0.5) == {"gamma": pytest.approx(0.505)}


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^gamma_end: got 0\.0, must be > 0$"):
        SmoothL0(gamma_end=0.0)
    with pytest.raises(ConfigError, match=r"^anneal_from: got 0\.6, must be ≤ anneal_to, which is 0\.5$"):
        SmoothL0(anneal_from=0.6, anneal_to=0.5)
