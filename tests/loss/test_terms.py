"""Every term of the loss against numbers worked out by hand on 2x2 matrices.

The model (see conftest.py): x = (1, 1) gives a = (1, 2) and y = (3, 2). Masked at both sites with m at `a`,
δ_a, m at `b`, δ_b: a' = (m₁, m₂ + δ_a) and y' = (m_b·(a'₁ + a'₂), δ_b·a'₂). An original `b` gives
(a'₁ + a'₂, a'₂). Causal importances: (1/2, 3/4) at `a`, 1/4 at `b`.
"""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import MaskSource
from spd_hydra.decomposition.routing import Routing
from spd_hydra.loss.ascent import Scope
from spd_hydra.loss.base import Loss, Statistics
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.faithfulness import Faithfulness, faithfulness_statistics
from spd_hydra.loss.hidden_acts_recon import HiddenActsRecon
from spd_hydra.loss.importance_minimality import ImportanceMinimality
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective
from spd_hydra.loss.pgd_recon import PGDRecon
from spd_hydra.loss.recon import Recon
from spd_hydra.loss.smooth_l0 import SmoothL0
from spd_hydra.precision import Precision
from spd_hydra.section import ConfigError

MakeModel = Callable[..., DecomposedModel]
ONE = torch.ones(1, 2)


def statistics(
    model: DecomposedModel,
    term: Loss,
    batch: Tensor = ONE,
    draws: Tensor | None = None,
    *,
    divergence: Divergence = Divergence.mse,
    p: float | None = None,
) -> Statistics:
    objective = Objective(model, LossSet(divergence=divergence), precision=Precision.fp32, ci_threshold=0.1)
    draws = torch.zeros(len(batch), 0) if draws is None else draws
    scheduled = term.scheduled(0) if p is None else {"p": p}
    schedule = {"term": {name: torch.tensor(number) for name, number in scheduled.items()}}
    return objective.statistics(objective.inputs(batch), {"term": term}, draws, schedule)["term"]


def value(
    model: DecomposedModel,
    term: Loss,
    batch: Tensor = ONE,
    draws: Tensor | None = None,
    *,
    divergence: Divergence = Divergence.mse,
    reference: int = 1,
) -> float:
    return term.value(statistics(model, term, batch, draws, divergence=divergence), reference).item()


def mse(masked: tuple[float, float]) -> float:
    """Mean squared distance from the target's output (3, 2)."""
    return ((masked[0] - 3) ** 2 + (masked[1] - 2) ** 2) / 2


def test_faithfulness_is_the_mean_squared_entry_of_the_weight_deltas(hand_made: MakeModel) -> None:
    # one entry of 1 in each of two deltas with four entries
    assert value(hand_made(), Faithfulness()) == 2 / 8


def test_faithfulness_does_not_depend_on_data(hand_made: MakeModel) -> None:
    model = hand_made()
    assert value(model, Faithfulness(), torch.randn(7, 2)) == 0.25
    found = faithfulness_statistics(model)
    assert {name: total.item() for name, total in found.items()} == {"sum": 2, "count": 8}


def test_faithfulness_counts_decomposed_matrices_only(chain: MakeModel) -> None:
    model = chain()
    # 7·5 + 4·7 + 3·4 entries, no biases
    assert faithfulness_statistics(model)["count"].item() == 75
    expected = sum(
        (model.weight(s) - (model.pieces(s).V @ model.pieces(s).U).T).square().sum().item()
        for s in model.site_names
    )
    assert faithfulness_statistics(model)["sum"].item() == pytest.approx(expected, rel=1e-6)


def test_unmasked_recon_leaves_out_the_weight_delta(hand_made: MakeModel) -> None:
    # a' = (1, 1), y' = (2, 0)
    assert value(hand_made(), Recon(masks=MaskSource.unmasked)) == mse((2, 0)) == 2.5


def test_ci_masked_recon(hand_made: MakeModel) -> None:
    # a' = (1/2, 3/4), y' = (5/16, 0)
    assert value(hand_made(), Recon(masks=MaskSource.ci)) == pytest.approx(mse((5 / 16, 0)))


def test_ci_masked_recon_layerwise_is_the_mean_over_sites(hand_made: MakeModel) -> None:
    # only a: (5/4, 3/4); only b: a = (1, 2), so (3/4, 0)
    term = Recon(masks=MaskSource.ci, routing=Routing.layerwise)
    assert value(hand_made(), term) == pytest.approx((mse((5 / 4, 3 / 4)) + mse((3 / 4, 0))) / 2)


STOCHASTIC = torch.tensor([[0.5, 0.25, 0.75, 0.5, 0.25]])  # r at a, δ_a; r at b, δ_b
# m_a = (1/2 + 1/4, 3/4 + 1/16) = (3/4, 13/16), a' = (3/4, 13/16 + 3/4) = (3/4, 25/16); m_b = 1/4 + 3/8 = 5/8


def test_stochastic_recon_with_the_weight_delta(hand_made: MakeModel) -> None:
    found = value(hand_made(), Recon(), ONE, STOCHASTIC)
    assert found == pytest.approx(mse((5 / 8 * (3 / 4 + 25 / 16), 1 / 4 * 25 / 16)))


def test_stochastic_recon_without_the_weight_delta(hand_made: MakeModel) -> None:
    found = value(hand_made(use_delta=False), Recon(), ONE, STOCHASTIC)
    assert found == pytest.approx(mse((5 / 8 * (3 / 4 + 13 / 16), 0)))


def test_stochastic_recon_layerwise(hand_made: MakeModel) -> None:
    found = value(hand_made(), Recon(routing=Routing.layerwise), ONE, STOCHASTIC)
    only_a = mse((3 / 4 + 25 / 16, 25 / 16))
    only_b = mse((5 / 8 * 3, 1 / 4 * 2))
    assert found == pytest.approx((only_a + only_b) / 2)


def test_stochastic_recon_is_the_mean_over_samples(hand_made: MakeModel) -> None:
    model, other = hand_made(), torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]])
    both = value(model, Recon(n_samples=2), ONE, torch.cat([STOCHASTIC, other], dim=1))
    alone = [value(model, Recon(), ONE, draws) for draws in (STOCHASTIC, other)]
    assert alone[1] == pytest.approx(mse((1 / 2 + 3 / 4, 3 / 4)))
    assert both == pytest.approx(sum(alone) / 2)


def test_layerwise_with_samples_is_the_mean_over_samples_and_sites(hand_made: MakeModel) -> None:
    model, other = hand_made(), torch.tensor([[0.0, 0.0, 0.0, 1.0, 1.0]])
    term = Recon(routing=Routing.layerwise, n_samples=2)
    both = value(model, term, ONE, torch.cat([STOCHASTIC, other], dim=1))
    alone = [value(model, Recon(routing=Routing.layerwise), ONE, draws) for draws in (STOCHASTIC, other)]
    assert both == pytest.approx(sum(alone) / 2)


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ([0.1, 0.9, 0.0], mse((3 / 4 + 25 / 16, 25 / 16))),  # k = 1: a
        ([0.9, 0.1, 0.0], mse((5 / 8 * 3, 1 / 2))),  # k = 1: b
        ([0.9, 0.1, 0.5], mse((5 / 8 * (3 / 4 + 25 / 16), 25 / 64))),  # k = 2: both
    ],
)
def test_stochastic_recon_on_a_subset(hand_made: MakeModel, route: list[float], expected: float) -> None:
    draws = torch.cat([torch.tensor([route]), STOCHASTIC], dim=1)
    assert value(hand_made(), Recon(routing=Routing.uniform_k), ONE, draws) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.9], mse((5 / 4, 3 / 4))),
        ([0.1, 0.1], mse((5 / 16, 0))),
        ([0.9, 0.9], 0.0),  # nothing routed: the target itself
    ],
)
def test_ci_masked_recon_on_a_static_subset(
    hand_made: MakeModel, scores: list[float], expected: float
) -> None:
    term = Recon(masks=MaskSource.ci, routing=Routing.static, probability=0.5)
    assert value(hand_made(), term, ONE, torch.tensor([scores])) == pytest.approx(expected)


def test_positions_of_one_batch_are_routed_on_their_own(hand_made: MakeModel) -> None:
    term = Recon(masks=MaskSource.ci, routing=Routing.static)
    found = value(hand_made(), term, torch.ones(2, 2), torch.tensor([[0.1, 0.9], [0.9, 0.9]]))
    assert found == pytest.approx(mse((5 / 4, 3 / 4)) / 2)


def test_binomial_recon(hand_made: MakeModel) -> None:
    # r, δ_a, u at a; then b. g_a = 1.05·(1/2, 3/4) - 0.05·(1, 0); r = (0, 1), so m_a = (0.475, 1)
    draws = torch.tensor([[0.9, 0.1, 0.25, 1.0, 0.0, 0.6, 0.5, 0.5]])
    # g_b = 1.05/4 - 0.025 = 0.2375, r = 0
    a = (0.475, 1 + 0.25)
    found = value(hand_made(), Recon(masks=MaskSource.binomial), ONE, draws)
    assert found == pytest.approx(mse((0.2375 * sum(a), 0.5 * a[1])))


def test_kl_recon(hand_made: MakeModel) -> None:
    # unmasked: logits (2, 0) against the target's (3, 2)
    p, q = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    found = value(hand_made(), Recon(masks=MaskSource.unmasked), divergence=Divergence.kl)
    assert found == pytest.approx(expected, rel=1e-5)


def test_columns_of_a_recon_term(chain: MakeModel) -> None:
    model = chain()  # C = 6, 3, 9
    assert Recon().columns(model) == 7 + 4 + 10
    assert Recon(n_samples=3).columns(model) == 3 * 21
    assert Recon(routing=Routing.layerwise).columns(model) == 21
    assert Recon(routing=Routing.uniform_k).columns(model) == 21 + 4
    assert Recon(routing=Routing.static).columns(model) == 21 + 3
    assert Recon(masks=MaskSource.binomial).columns(model) == 13 + 7 + 19
    assert Recon(masks=MaskSource.ci, routing=Routing.uniform_k, n_samples=2).columns(model) == 2 * 4
    assert Recon(masks=MaskSource.unmasked).columns(model) == 0
    assert Faithfulness().columns(model) == 0
    assert ImportanceMinimality().columns(model) == 0


@pytest.mark.parametrize(
    ("p", "expected"),
    [(1.0, 0.5 + 0.75 + 0.25), (2.0, 1 / 4 + 9 / 16 + 1 / 16), (0.5, math.sqrt(0.5) + math.sqrt(0.75) + 0.5)],
)
def test_importance_minimality_sums_powers_over_sites_and_subcomponents(
    hand_made: MakeModel, p: float, expected: float
) -> None:
    term = ImportanceMinimality(p_start=p, p_end=p)
    for batch in (ONE, torch.ones(5, 2)):  # a mean over positions
        assert value(hand_made(), term, batch) == pytest.approx(expected, rel=1e-6)


def test_importance_minimality_with_the_frequency_factor(hand_made: MakeModel) -> None:
    # f = 1/2, 3/4, 1/4 and N = 4: factors 1 + β·log2 of 3, 4, 2
    term = ImportanceMinimality(beta=0.5)
    expected = 0.5 * (1 + 0.5 * math.log2(3)) + 0.75 * (1 + 0.5 * 2) + 0.25 * (1 + 0.5 * 1)
    for batch in (ONE, torch.ones(5, 2)):  # N is the reference, whatever was measured on
        assert value(hand_made(), term, batch, reference=4) == pytest.approx(expected, rel=1e-6)


def test_importance_minimality_uses_the_upper_function(hand_made: MakeModel) -> None:
    model = hand_made()
    with torch.no_grad():
        model.get_parameter("ci_fn.sites.a.b_out").copy_(torch.tensor([-3.0, 2.0]))
    assert value(model, ImportanceMinimality()) == pytest.approx(0 + 1.01 + 0.25, rel=1e-6)


def test_eps_is_inside_the_power(hand_made: MakeModel) -> None:
    model = hand_made()
    with torch.no_grad():
        model.get_parameter("ci_fn.sites.a.b_out").copy_(torch.tensor([-1.0, -1.0]))
    term = ImportanceMinimality(p_start=0.5, p_end=0.5, eps=1e-4)
    assert value(model, term) == pytest.approx(0.01 + 0.01 + math.sqrt(0.2501), rel=1e-5)
    assert ImportanceMinimality().eps == 1e-12


def test_importance_minimality_takes_the_scheduled_exponent(hand_made: MakeModel) -> None:
    term = ImportanceMinimality(p_start=2, p_end=1)
    found = term.value(statistics(hand_made(), term, p=2.0), 1)
    assert found.item() == pytest.approx(1 / 4 + 9 / 16 + 1 / 16, rel=1e-6)


def test_p_is_linear_between_two_fractions_of_training() -> None:
    term = ImportanceMinimality(p_start=2, p_end=0.4, anneal_from=0.25, anneal_to=0.75)
    expected = {0: 2, 0.25: 2, 0.375: 1.6, 0.5: 1.2, 0.625: 0.8, 0.75: 0.4, 1: 0.4}
    assert {t: term.p(t) for t in expected} == pytest.approx(expected)
    assert term.scheduled(0.5) == {"p": pytest.approx(1.2)}


def test_p_may_jump_or_stay() -> None:
    jump = ImportanceMinimality(p_start=2, p_end=1, anneal_from=0.5, anneal_to=0.5)
    assert [jump.p(t) for t in (0, 0.499, 0.5, 1)] == [2, 2, 1, 1]
    stay = ImportanceMinimality(p_start=2, p_end=2)
    assert stay.p(0.3) == 2
    assert stay.scheduled(0.3) == {}


def test_an_anneal_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^anneal_from: got 0\.6, must be ≤ anneal_to, which is 0\.5$"):
        ImportanceMinimality(anneal_from=0.6, anneal_to=0.5)


@pytest.mark.parametrize(
    ("cls", "field", "bad"),
    [
        (Recon, "coeff", -1.0),
        (Recon, "coeff", math.nan),
        (Recon, "n_samples", 0),
        (Recon, "probability", 0.0),
        (Recon, "probability", 1.5),
        (ImportanceMinimality, "p_end", 0.0),
        (ImportanceMinimality, "beta", -0.1),
        (ImportanceMinimality, "eps", 0.0),
        (ImportanceMinimality, "anneal_to", 1.1),
        (Faithfulness, "coeff", math.inf),
    ],
)
def test_values_out_of_range_are_refused(cls: type[Loss], field: str, bad: float) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: got {bad}, must be "):
        cls(**{field: bad})


TERMS: list[Loss] = [
    Faithfulness(),
    ImportanceMinimality(),
    ImportanceMinimality(beta=0.5, p_start=2, p_end=2),
    Recon(),
    Recon(n_samples=3),
    Recon(routing=Routing.layerwise, n_samples=2),
    Recon(routing=Routing.uniform_k),
    Recon(routing=Routing.static, masks=MaskSource.binomial),
    Recon(masks=MaskSource.ci),
    Recon(masks=MaskSource.unmasked),
    HiddenActsRecon(n_samples=2),
    PGDRecon(n_steps=2, step_size=0.5, scope=Scope.per_datapoint),
    SmoothL0(gamma_start=0.5, frequency_coeff=0.5, frequency_scale=30),
]


@pytest.mark.parametrize("divergence", [Divergence.mse, Divergence.kl])
@pytest.mark.parametrize("term", TERMS)
def test_the_value_of_added_statistics_is_that_of_all_the_data(
    chain: MakeModel, term: Loss, divergence: Divergence
) -> None:
    model, generator = chain(), torch.Generator().manual_seed(1)
    batch = torch.randn(12, 5, generator=generator)
    draws = torch.rand(12, term.columns(model), generator=generator)
    whole = term.value(statistics(model, term, batch, draws, divergence=divergence), 12)
    added: Statistics = {}
    for cut in (slice(0, 5), slice(5, 6), slice(6, 12)):  # unequal parts
        part = statistics(model, term, batch[cut], draws[cut], divergence=divergence)
        added = {name: added.get(name, torch.zeros(())) + total for name, total in part.items()}
    torch.testing.assert_close(term.value(added, 12), whole, rtol=1e-5, atol=1e-7)


# The worst point of an ascent is chosen by row, and a row of several positions has one.
@pytest.mark.parametrize("term", [term for term in TERMS if not isinstance(term, PGDRecon)])
def test_positions_along_a_sequence_count_like_rows(term: Loss, chain: MakeModel) -> None:
    model, generator = chain(), torch.Generator().manual_seed(1)
    batch = torch.randn(12, 5, generator=generator)
    draws = torch.rand(12, term.columns(model), generator=generator)
    flat = value(model, term, batch, draws, reference=12)
    shaped = value(
        model,
        term,
        batch.reshape(3, 4, 5),
        draws.reshape(3, 4, -1) if draws.numel() else torch.zeros(3, 4, 0),
        reference=12,
    )
    assert shaped == pytest.approx(flat, rel=1e-5)


@pytest.mark.parametrize("term", [term for term in TERMS[1:] if not isinstance(term, PGDRecon)])
def test_gradients_are_those_of_finite_differences(term: Loss, chain: MakeModel) -> None:
    model, generator = chain(), torch.Generator().manual_seed(1)
    batch = torch.randn(50, 5, generator=generator)
    draws = torch.rand(50, term.columns(model), generator=generator)
    with torch.no_grad():  # z inside (0, 1), where every function involved is smooth
        for name, parameter in model.ci_fn.named_parameters():
            parameter.mul_(0.05).add_(0.5 if name.endswith("b_out") else 0)
    wanted = [p for p in model.parameters() if p.requires_grad]
    loss = term.value(statistics(model, term, batch, draws), 50)
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    directions = [torch.randn(p.shape, generator=generator) for p in wanted]
    expected = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    ends = []
    for step in (2e-3, -2e-3):
        with torch.no_grad():
            for p, d in zip(wanted, directions, strict=True):
                p.add_(step * d)
            ends.append(value(model, term, batch, draws, reference=50))
            for p, d in zip(wanted, directions, strict=True):
                p.sub_(step * d)
    assert (ends[0] - ends[1]) / 4e-3 == pytest.approx(expected, rel=0.03)
