"""The objective: what is summed, what is computed at all, and that compiling changes nothing."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from spd_hydra import rng
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import MaskSource
from spd_hydra.decomposition.roots import find_roots
from spd_hydra.decomposition.routing import Routing
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.faithfulness import Faithfulness
from spd_hydra.loss.hidden_acts_recon import HiddenActsRecon
from spd_hydra.loss.importance_minimality import ImportanceMinimality
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective
from spd_hydra.loss.pgd_recon import PGDRecon
from spd_hydra.loss.recon import Recon
from spd_hydra.precision import Precision
from spd_hydra.step import Step

MakeModel = Callable[..., DecomposedModel]
ROWS = 16


def batch() -> Tensor:
    return torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(1))


def objective(
    model: DecomposedModel, losses: LossSet, precision: Precision = Precision.fp32, threshold: float = 0.1
) -> Objective:
    return Objective(model, losses, precision=precision, ci_threshold=threshold)


def draw(own: Objective, step: int = 0) -> Tensor:
    rows = torch.arange(ROWS, dtype=torch.int32)
    return rng.uniform(rng.key(0, "masks", step), rows, own.columns(own.losses.active_terms()))


def everything() -> LossSet:
    return LossSet(
        faithfulness=Faithfulness(coeff=0.5),
        importance_minimality=ImportanceMinimality(
            coeff=0.25, p_start=2, p_end=1, beta=0.5, squeeze=3, squeeze_from=0.4, squeeze_to=0.6
        ),
        stochastic_recon=Recon(coeff=1.5, n_samples=2),
        stochastic_recon_layerwise=Recon(coeff=0.75, routing=Routing.layerwise),
        stochastic_recon_subset=Recon(coeff=0.3, routing=Routing.uniform_k),
        ci_masked_recon=Recon(coeff=0.2, masks=MaskSource.ci),
        ci_masked_recon_layerwise=Recon(coeff=0.1, masks=MaskSource.ci, routing=Routing.layerwise),
        ci_masked_recon_subset=Recon(coeff=0.15, masks=MaskSource.ci, routing=Routing.uniform_k),
        unmasked_recon=Recon(coeff=0.05, masks=MaskSource.unmasked),
        extra={"mine": Recon(coeff=0.35, masks=MaskSource.binomial, routing=Routing.static)},
    )


def test_the_terms_of_the_set_are_the_grid_of_masks_and_routings() -> None:
    grid = {
        name: (t.masks.name, t.routing.name) for name, t in LossSet().terms().items() if isinstance(t, Recon)
    }
    assert grid == {
        "stochastic_recon": ("stochastic", "all"),
        "stochastic_recon_layerwise": ("stochastic", "layerwise"),
        "stochastic_recon_subset": ("stochastic", "uniform_k"),
        "ci_masked_recon": ("ci", "all"),
        "ci_masked_recon_layerwise": ("ci", "layerwise"),
        "ci_masked_recon_subset": ("ci", "uniform_k"),
        "unmasked_recon": ("unmasked", "all"),
    }
    adversarial = {name: t.routing.name for name, t in LossSet().terms().items() if isinstance(t, PGDRecon)}
    assert adversarial == {
        "pgd_recon": "all",
        "pgd_recon_layerwise": "layerwise",
        "pgd_recon_subset": "uniform_k",
    }
    assert LossSet().terms().keys() - grid.keys() - adversarial.keys() == {
        "faithfulness",
        "importance_minimality",
        "smooth_l0",
        "hidden_acts_recon",
        "persistent_pgd_recon",
    }


def test_what_costs_much_is_measured_only_where_it_is_trained_on() -> None:
    always = LossSet().measured_terms().keys()
    assert LossSet().terms().keys() - always == {
        "smooth_l0",
        "hidden_acts_recon",
        "pgd_recon",
        "pgd_recon_layerwise",
        "pgd_recon_subset",
        "persistent_pgd_recon",
    }
    losses = LossSet(hidden_acts_recon=HiddenActsRecon(coeff=0.1))
    assert losses.measured_terms().keys() - always == {"hidden_acts_recon"}


def test_every_term_is_off_by_default_and_compares_with_mse() -> None:
    assert LossSet().active_terms() == {}
    assert LossSet().divergence is Divergence.mse


def test_the_total_is_the_sum_of_coefficients_times_terms(chain: MakeModel) -> None:
    own = objective(chain(), everything())
    loss = own(batch(), draw(own), own.scheduled(0.5))
    coefficients = {
        "faithfulness": 0.5,
        "importance_minimality": 0.25 * 3,  # squeezed at half of the training
        "stochastic_recon": 1.5,
        "stochastic_recon_layerwise": 0.75,
        "stochastic_recon_subset": 0.3,
        "ci_masked_recon": 0.2,
        "ci_masked_recon_layerwise": 0.1,
        "ci_masked_recon_subset": 0.15,
        "unmasked_recon": 0.05,
        "mine": 0.35,
    }
    assert loss.terms.keys() == coefficients.keys()
    expected = sum(coefficient * float(loss.terms[name]) for name, coefficient in coefficients.items())
    assert loss.total.item() == pytest.approx(expected, rel=1e-6)
    assert loss.total.requires_grad
    assert not any(term.requires_grad for term in loss.terms.values())


@pytest.mark.parametrize(
    ("losses", "passes"),
    [
        (LossSet(faithfulness=Faithfulness(coeff=1)), 0),
        (LossSet(importance_minimality=ImportanceMinimality(coeff=1)), 0),
        (LossSet(stochastic_recon=Recon(coeff=1, n_samples=2)), 2),
        (LossSet(stochastic_recon_layerwise=Recon(coeff=1, routing=Routing.layerwise)), 3),
        (LossSet(stochastic_recon_subset=Recon(coeff=1, routing=Routing.uniform_k)), 1),
        (
            LossSet(unmasked_recon=Recon(coeff=1, masks=MaskSource.unmasked), ci_masked_recon=Recon(coeff=0)),
            1,
        ),
        (everything(), 2 + 3 + 1 + 1 + 3 + 1 + 1 + 1),
    ],
)
def test_a_term_with_coefficient_zero_is_not_computed(chain: MakeModel, losses: LossSet, passes: int) -> None:
    model = chain()
    own = objective(model, losses)
    with (
        patch.object(model, "forward", wraps=model.forward) as masked,
        patch.object(model, "clean_pass", wraps=model.clean_pass) as clean,
        patch.object(model.ci_fn, "forward", wraps=model.ci_fn.forward) as ci_fn,
    ):
        own(batch(), draw(own), own.scheduled(0))
    assert masked.call_count == passes
    assert clean.call_count == 1
    assert ci_fn.call_count == 1


def test_a_terms_draws_do_not_depend_on_which_other_terms_are_on(chain: MakeModel) -> None:
    model, full = chain(), everything()
    whole = objective(model, full)
    together = whole(batch(), draw(whole), whole.scheduled(0)).terms
    for name, term in full.active_terms().items():
        losses = LossSet(extra={name: term}) if name == "mine" else LossSet(**{name: term})
        alone = objective(model, losses)
        (value,) = alone(batch(), draw(alone), alone.scheduled(0)).terms.values()
        assert torch.equal(value, together[name]), name


def test_draws_differ_between_terms_sites_and_samples(chain: MakeModel) -> None:
    own = objective(chain(), everything())
    columns = own.columns(own.losses.active_terms())
    assert len(set(columns.tolist())) == len(columns)
    assert len(columns) == 42 + 21 + 25 + 4 + (13 + 7 + 19 + 3)


def test_another_step_draws_other_masks(chain: MakeModel) -> None:
    own = objective(chain(), LossSet(stochastic_recon=Recon(coeff=1)))
    first, second = (own(batch(), draw(own, step), {}).total for step in (0, 1))
    assert first != second


def test_only_terms_that_change_have_scheduled_values(chain: MakeModel) -> None:
    own = objective(chain(), everything())
    scheduled = own.scheduled(0.25)
    assert scheduled.keys() == {"importance_minimality"}
    assert scheduled["importance_minimality"] == {"p": 1.75, "pressure": 1}
    assert objective(chain(), LossSet()).scheduled(0.5) == {}


def test_l0_is_the_mean_number_of_subcomponents_above_the_threshold(hand_made: MakeModel) -> None:
    # causal importances (1/2, 3/4) at a and 1/4 at b, at every position
    model, x = hand_made(), torch.ones(3, 2)
    losses = LossSet(unmasked_recon=Recon(coeff=1, masks=MaskSource.unmasked))
    for threshold, expected in ((0.1, (2, 1)), (0.3, (2, 0)), (0.6, (1, 0)), (0.75, (0, 0))):
        found = objective(model, losses, threshold=threshold)(x, torch.zeros(3, 0), {}).l0
        assert (float(found["a"]), float(found["b"])) == expected


def test_l0_is_a_mean_over_positions(chain: MakeModel) -> None:
    model = chain()
    own = objective(model, LossSet(unmasked_recon=Recon(coeff=1, masks=MaskSource.unmasked)))
    found = own(batch(), draw(own), {}).l0
    for site, ci in model.causal_importances(batch()).items():
        expected = sum(float(g > 0.1) for row in ci.lower for g in row) / ROWS
        assert float(found[site]) == pytest.approx(expected)


@pytest.mark.parametrize("roots", [True, False])
def test_knowing_the_roots_changes_no_term_and_no_gradient(chain: MakeModel, roots: bool) -> None:
    plain, known = chain(), chain()
    if roots:
        known.roots = find_roots(known, batch(), known.clean_pass(batch()))
        assert known.roots == {"first"}
    results = []
    for model in (plain, known):
        own = objective(model, everything())
        loss = own(batch(), draw(own), own.scheduled(0))
        results.append((loss.total, *torch.autograd.grad(loss.total, trained(model))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def trained(model: DecomposedModel) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("divergence", [Divergence.mse, Divergence.kl])
def test_bf16_runs_layers_in_half_precision_and_keeps_the_rest_in_float32(
    chain: MakeModel, divergence: Divergence
) -> None:
    model, losses = chain(), everything()
    losses.divergence = divergence
    single, half = objective(model, losses), objective(model, losses, Precision.bf16)
    inputs = half.inputs(batch())
    assert inputs.clean.output.dtype == torch.bfloat16
    statistics = half.statistics(inputs, losses.active_terms(), draw(half), half.scheduled(0.5))
    for name, own in statistics.items():
        assert {total.dtype for total in own.values()} == {torch.float32}, name
    exact = single(batch(), draw(single), single.scheduled(0.5))
    rough = half(batch(), draw(half), half.scheduled(0.5))
    assert torch.equal(rough.terms["faithfulness"], exact.terms["faithfulness"])
    for name, term in exact.terms.items():
        assert float(rough.terms[name]) == pytest.approx(float(term), rel=0.1), name
    assert rough.terms["stochastic_recon"] != exact.terms["stochastic_recon"]
    torch.autograd.backward(rough.total)
    assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in trained(model))
    assert all(p.dtype == torch.float32 for p in model.target.parameters())


@pytest.mark.parametrize("precision", Precision)
def test_masked_passes_run_in_the_precision_of_the_clean_one(chain: MakeModel, precision: Precision) -> None:
    model = chain()
    own = objective(model, LossSet(stochastic_recon=Recon(coeff=1)), precision)
    autocast: list[bool] = []

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return DecomposedModel.forward(model, *args, **kwargs)

    with patch.object(model, "forward", watched):
        own(batch(), draw(own), {})
    assert autocast == [precision is Precision.bf16]


def test_faithfulness_stays_in_float32_inside_a_users_own_autocast(chain: MakeModel) -> None:
    model = chain()
    own = objective(model, LossSet(faithfulness=Faithfulness(coeff=1)))
    exact = own(batch(), draw(own), {}).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert own.losses.faithfulness.statistics(own.inputs(batch()))["sum"] / 75 == exact


def test_the_loss_is_a_pure_function(chain: MakeModel) -> None:
    model = chain()
    own = objective(model, everything())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(1)
    first = own(batch(), draw(own), own.scheduled(0))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = own(batch(), draw(own), own.scheduled(0))
    assert torch.equal(first.total, second.total)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def gradients_of(loss: Tensor, model: DecomposedModel) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, trained(model), allow_unused=True, materialize_grads=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("divergence", "names"),
    [
        (
            Divergence.mse,
            [
                "faithfulness",
                "importance_minimality",
                "stochastic_recon_layerwise",
                "stochastic_recon_subset",
            ],
        ),
        (Divergence.kl, ["importance_minimality", "stochastic_recon", "unmasked_recon"]),
    ],
)
def test_the_compiled_step_equals_the_eager_one(
    chain: MakeModel, divergence: Divergence, names: list[str]
) -> None:
    terms = everything().terms()
    model, losses = chain(), LossSet(divergence=divergence, **{name: terms[name] for name in names})
    model.roots = find_roots(model, batch(), model.clean_pass(batch()))
    own = objective(model, losses)
    steps = [Step(own, compile=compile) for compile in (False, True)]
    for step in (0, 1):  # another p does not need another graph
        results = []
        for function in steps:
            loss = function(batch(), draw(own, step), own.scheduled(step / 2))
            found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained(model)]
            results.append((loss, found))
        (eager, eager_gradients), (fused, fused_gradients) = results
        torch.testing.assert_close(fused.total, eager.total, rtol=1e-6, atol=1e-6)
        for name, term in eager.terms.items():
            torch.testing.assert_close(fused.terms[name], term, rtol=1e-6, atol=1e-6)
        for site, number in eager.l0.items():
            assert torch.equal(fused.l0[site], number)
        for a, b in zip(fused_gradients, eager_gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_loss_that_some_parameters_do_not_enter_compiles(chain: MakeModel) -> None:
    model = chain()
    own = objective(model, LossSet(faithfulness=Faithfulness(coeff=1.0)))
    for compile in (False, True):
        Step(own, compile=compile)(batch(), draw(own, 0), {})
        assert all(p.grad is None or not p.grad.any() for p in model.ci_parameters())
        assert all(p.grad is not None and p.grad.any() for p in model.component_parameters())
