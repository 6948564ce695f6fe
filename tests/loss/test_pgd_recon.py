"""Adversarial reconstruction on a model whose worst masks can be found by trying all of them.

The model: see conftest.py and test_terms.py. With sources r in [0, 1], the output is linear in each of them,
so the squared error is convex in each, and its maximum lies in a corner of {0, 1}⁵.
"""

import itertools
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from spd_hydra import rng
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.roots import find_roots
from spd_hydra.decomposition.routing import Routing
from spd_hydra.loss.ascent import Scope, Start, start_sources
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective
from spd_hydra.loss.pgd_recon import PGDRecon
from spd_hydra.precision import Precision
from spd_hydra.section import ConfigError
from spd_hydra.step import StackedStep, Step

MakeModel = Callable[..., DecomposedModel]
CORNERS = torch.tensor(list(itertools.product((0.0, 1.0), repeat=5)))
SIGNS = torch.tensor([[1.0, 1.0], [-1.0, 1.0]])


def objective(model: DecomposedModel, **terms: PGDRecon) -> Objective:
    return Objective(model, LossSet(**terms), precision=Precision.fp32, ci_threshold=0.1)


def drawn(own: Objective, term: PGDRecon, rows: int, step: int = 0) -> Tensor:
    return rng.uniform(
        rng.key(0, "test", step), torch.arange(rows, dtype=torch.int32), own.columns({"t": term})
    )


def value(
    model: DecomposedModel, term: PGDRecon, batch: Tensor, draws: Tensor | None = None, step: int = 0
) -> float:
    own = objective(model)
    draws = drawn(own, term, len(batch), step) if draws is None else draws
    found = own.statistics(own.inputs(batch), {"t": term}, draws, {})["t"]
    return term.value(found, 1).item()


def by_hand(x: Tensor, r: Tensor) -> Tensor:
    """Squared error by row under the sources r: of a, δ_a, of b, δ_b."""
    m1, m2, delta_a, m_b, delta_b = (
        g + (1 - g) * own for g, own in zip((0.5, 0.75, 0, 0.25, 0), r.unbind(-1), strict=True)
    )
    a1, a2 = m1 * x[:, 0], (m2 + delta_a) * x[:, 1]
    error = torch.stack([m_b * (a1 + a2) - (x[:, 0] + 2 * x[:, 1]), delta_b * a2 - 2 * x[:, 1]], dim=1)
    return error.square().mean(1)


def test_the_optimum_over_all_corners_is_found(hand_made: MakeModel) -> None:
    x = torch.ones(1, 2)
    best = max(by_hand(x, corner).item() for corner in CORNERS)
    assert best == pytest.approx(((3 - 5 / 16) ** 2 + 4) / 2)  # everything as small as it can be
    for scope in Scope:
        for step in range(3):  # from different starts
            term = PGDRecon(n_steps=5, step_size=0.25, scope=scope)
            assert value(hand_made(), term, x, step=step) == pytest.approx(best, rel=1e-6)


def test_shared_sources_are_the_worst_for_all_rows_together_others_for_each(hand_made: MakeModel) -> None:
    together = max(by_hand(SIGNS, corner).mean().item() for corner in CORNERS)
    each = torch.stack([by_hand(SIGNS, corner) for corner in CORNERS]).amax(0).mean().item()
    found = {
        scope: max(
            value(hand_made(), PGDRecon(n_steps=20, step_size=0.1, scope=scope), SIGNS, step=step)
            for step in range(4)
        )
        for scope in Scope
    }
    assert found[Scope.shared] == pytest.approx(together, rel=1e-6)
    assert found[Scope.per_datapoint] == pytest.approx(each, rel=1e-6)


@pytest.mark.parametrize(
    ("start", "r"), [(Start.zeros, [0.0, 0, 0, 0, 0]), (Start.ones, [1.0, 1, 0, 1, 0])], ids=str
)
@pytest.mark.parametrize("scope", Scope)
def test_without_steps_the_masks_are_those_of_the_start_without_the_weight_delta(
    hand_made: MakeModel, start: Start, scope: Scope, r: list[float]
) -> None:
    found = value(hand_made(), PGDRecon(n_steps=0, start=start, scope=scope), SIGNS)
    assert found == pytest.approx(by_hand(SIGNS, torch.tensor(r)).mean().item(), abs=1e-7)


@pytest.mark.parametrize("scope", Scope)
def test_an_ascent_climbs_from_everything_on(hand_made: MakeModel, scope: Scope) -> None:
    steps = [value(hand_made(), PGDRecon(n_steps=n, start=Start.ones, scope=scope), SIGNS) for n in (0, 20)]
    assert steps[1] > 1.5 * steps[0] > 0


def test_without_the_weight_delta_only_subcomponents_are_masked(hand_made: MakeModel) -> None:
    x = torch.ones(1, 2)
    corners = CORNERS * torch.tensor([1, 1, 0, 1, 0])
    best = max(by_hand(x, corner).item() for corner in corners)
    found = value(hand_made(use_delta=False), PGDRecon(n_steps=5, step_size=0.25), x)
    assert found == pytest.approx(best, rel=1e-6)


def test_layerwise_every_site_has_its_own_adversary(hand_made: MakeModel) -> None:
    x = torch.ones(1, 2)
    # only a: y = (a₁ + a₂, a₂), least a = (1/2, 3/4); only b: a = (1, 2), least m_b = 1/4, δ_b = 0
    only_a = ((3 - 5 / 4) ** 2 + (2 - 3 / 4) ** 2) / 2
    only_b = ((3 - 3 / 4) ** 2 + 2**2) / 2
    term = PGDRecon(n_steps=5, step_size=0.25, routing=Routing.layerwise)
    assert value(hand_made(), term, x) == pytest.approx((only_a + only_b) / 2, rel=1e-6)


def test_routes_are_drawn_once(hand_made: MakeModel) -> None:
    term = PGDRecon(n_steps=5, step_size=0.25, routing=Routing.static, start=Start.ones, probability=0.5)
    assert value(hand_made(), term, SIGNS, torch.ones(2, 2)) == 0  # nothing is routed, whatever the masks


@pytest.mark.parametrize("scope", Scope)
@pytest.mark.parametrize("routing", Routing)
@pytest.mark.parametrize("divergence", [Divergence.mse, Divergence.kl])
def test_the_value_never_falls_below_that_of_the_start(
    chain: MakeModel, scope: Scope, routing: Routing, divergence: Divergence
) -> None:
    model, x = chain(), torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    own = objective(model)
    own.losses.divergence = divergence
    before = found = 0.0
    for n_steps in (0, 1, 4, 12):  # a step of 1 jumps from corner to corner
        term = PGDRecon(n_steps=n_steps, step_size=1.0 if n_steps == 1 else 0.3, routing=routing, scope=scope)
        statistics = own.statistics(own.inputs(x), {"t": term}, drawn(own, term, 9), {})["t"]
        found = term.value(statistics, 1).item()
        if n_steps == 0:
            before = found
        assert found >= before
    assert found > before


def test_evaluation_finds_what_training_finds(chain: MakeModel) -> None:
    model, x = chain(), torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
    recorded = value(model, PGDRecon(n_steps=3, step_size=0.2), x)
    with torch.no_grad():
        assert value(model, PGDRecon(n_steps=3, step_size=0.2), x) == recorded


def test_a_shared_start_is_one_for_all_positions_and_uniform(chain: MakeModel) -> None:
    model = chain()
    own, term = objective(model), PGDRecon()
    draws = drawn(own, term, 6).view(2, 3, -1)
    assert draws.shape[-1] == term.columns(model) == 2
    found = start_sources(model, Start.random, Scope.shared, draws)
    assert {site: tuple(r.shape) for site, r in found.items()} == {
        "first": (1, 1, 7), "second": (1, 1, 4), "third": (1, 1, 10),
    }  # fmt: skip
    many = torch.cat([torch.cat([r.flatten() for r in start_sources(
        model, Start.random, Scope.shared, drawn(own, term, 6, step).view(2, 3, -1)).values()])
        for step in range(100)])  # fmt: skip
    assert many.unique().numel() == many.numel() == 2100
    assert many.mean().item() == pytest.approx(1 / 2, abs=0.02)
    assert many.var().item() == pytest.approx(1 / 12, abs=0.01)


def test_columns_of_the_terms(chain: MakeModel) -> None:
    model = chain()  # C = 6, 3, 9
    assert PGDRecon(start=Start.ones).columns(model) == 0
    assert PGDRecon(scope=Scope.per_datapoint).columns(model) == 7 + 4 + 10
    assert PGDRecon(scope=Scope.per_datapoint, start=Start.zeros).columns(model) == 0
    assert PGDRecon(routing=Routing.uniform_k).columns(model) == 2 + 4


def trained(model: DecomposedModel) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("scope", Scope)
def test_the_gradient_is_that_at_the_sources_found_and_nothing_is_left_over(
    chain: MakeModel, scope: Scope
) -> None:
    model, generator = chain(), torch.Generator().manual_seed(1)
    x = torch.randn(3, 5, generator=generator)
    with torch.no_grad():  # z inside (0, 1), where every function involved is smooth
        for name, parameter in model.ci_fn.named_parameters():
            parameter.mul_(0.05).add_(0.5 if name.endswith("b_out") else 0)
    term = PGDRecon(n_steps=1, step_size=1.0, scope=scope)  # ends in a corner, which small changes leave
    own = objective(model)
    draws = drawn(own, term, 3)
    loss = term.value(own.statistics(own.inputs(x), {"t": term}, draws, {})["t"], 1)
    assert all(p.grad is None for p in model.parameters())
    wanted = trained(model)
    gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    directions = [torch.randn(p.shape, generator=generator) for p in wanted]
    expected = sum((g * d).sum().item() for g, d in zip(gradients, directions, strict=True))
    ends = []
    for step in (2e-4, -2e-4):
        with torch.no_grad():
            for p, d in zip(wanted, directions, strict=True):
                p.add_(step * d)
            ends.append(value(model, term, x, draws))
            for p, d in zip(wanted, directions, strict=True):
                p.sub_(step * d)
    assert (ends[0] - ends[1]) / 4e-4 == pytest.approx(expected, rel=0.05)


def everything() -> dict[str, PGDRecon]:
    return {
        "pgd_recon": PGDRecon(coeff=1.0, n_steps=2, step_size=0.5),
        "pgd_recon_layerwise": PGDRecon(coeff=0.7, routing=Routing.layerwise, scope=Scope.per_datapoint),
        "pgd_recon_subset": PGDRecon(coeff=0.5, routing=Routing.uniform_k, start=Start.zeros),
    }


def step_of(own: Objective, x: Tensor) -> tuple[Tensor, Tensor]:
    columns = own.columns(own.losses.active_terms())
    return x, rng.uniform(rng.key(0, "step"), torch.arange(len(x), dtype=torch.int32), columns)


def test_replicas_find_what_each_would_find_alone(chain: MakeModel) -> None:
    x = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(1))
    models = [chain(), chain()]
    for model in models:
        model.roots = find_roots(model, x[0], model.clean_pass(x[0]))
    with torch.no_grad():
        for parameter in trained(models[1]):
            parameter.mul_(1.1)
    objectives = [objective(model, **everything()) for model in models]
    alone, gradients = [], []
    for own, rows in zip(objectives, x, strict=True):
        alone.append(Step(own, compile=False)(*step_of(own, rows), {}).total)
        gradients.append({n: p.grad for n, p in own.model.named_parameters() if p.grad is not None})
    together = StackedStep(objectives, compile=False)
    draws = torch.stack([step_of(own, rows)[1] for own, rows in zip(objectives, x, strict=True)])
    torch.testing.assert_close(together(x, draws, {}).total, torch.stack(alone))
    for number, wanted in enumerate(gradients):
        for name, gradient in wanted.items():
            found = together.parameters[f"model.{name}"].grad
            assert found is not None
            torch.testing.assert_close(found[number], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_the_compiled_step_equals_the_eager_one(chain: MakeModel) -> None:
    model, x = chain(), torch.randn(16, 5, generator=torch.Generator().manual_seed(1))
    term = PGDRecon(coeff=1.0, routing=Routing.uniform_k)
    own = objective(model, pgd_recon=term)
    totals, gradients = [], []
    for compile in (False, True):
        totals.append(Step(own, compile=compile)(*step_of(own, x), {}).total)
        gradients.append([torch.zeros_like(p) if p.grad is None else p.grad for p in trained(model)])
    torch.testing.assert_close(totals[1], totals[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-5)


def names_of(terms: Iterable[str]) -> set[str]:
    return {name for name in terms if "pgd" in name}


def test_a_term_that_is_not_trained_on_is_not_measured() -> None:
    assert names_of(LossSet().measured_terms()) == set()
    on = LossSet(pgd_recon_subset=PGDRecon(coeff=0.5))
    assert names_of(on.measured_terms()) == {"pgd_recon_subset"}


@pytest.mark.parametrize(("field", "bad"), [("n_steps", -1), ("step_size", 0.0), ("step_size", 1.5)])
def test_values_out_of_range_are_refused(field: str, bad: float) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: got {bad}, must be "):
        PGDRecon(**{field: bad})
