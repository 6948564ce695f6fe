"""Masks: the formula of each source, bounds, and when a delta is drawn."""

import re
from typing import Any

import pytest
import torch
from tests.decomposition.test_decomposed_model import batch_of, make

from spd_hydra.ci_fn.sigmoid import CausalImportance, Sigmoid, causal_importance
from spd_hydra.decomposition.masks import (
    MaskSource,
    SiteMask,
    columns_needed,
    draw_mask,
    mask_from_sources,
)

C = 4
Z = torch.tensor([[-0.5, 0.2, 0.96, 1.5], [0.0, 1.0, 0.5, -0.02]])


def ci(sigmoid: Sigmoid = Sigmoid.leaky_hard) -> CausalImportance:
    return causal_importance(Z, sigmoid)


def draws(source: MaskSource) -> torch.Tensor:
    return torch.rand(2, columns_needed(source, C), generator=torch.Generator().manual_seed(0))


def mask(source: MaskSource, given: torch.Tensor, *, use_delta: bool = True) -> SiteMask:
    return draw_mask(source, ci(), draws=given, use_delta=use_delta, sigmoid=Sigmoid.leaky_hard)


def test_unmasked_is_all_ones_without_a_delta() -> None:
    assert mask(MaskSource.unmasked, draws(MaskSource.unmasked)) == SiteMask(
        mask=None, delta=None, route=None
    )


def test_ci_masks_are_the_lower_causal_importances_without_a_delta() -> None:
    found = mask(MaskSource.ci, draws(MaskSource.ci))
    assert found.mask is not None
    torch.testing.assert_close(found.mask, torch.tensor([[0, 0.2, 0.96, 1], [0, 1, 0.5, 0]]))
    assert found.delta is None


def test_stochastic_masks_are_g_plus_one_minus_g_times_r() -> None:
    given = torch.tensor([[0.5, 0.5, 0.5, 0.25, 0.125], [0.75, 0.0, 0.25, 0.5, 0.875]])
    found = mask(MaskSource.stochastic, given)
    assert found.mask is not None
    assert found.delta is not None
    torch.testing.assert_close(found.mask, torch.tensor([[0.5, 0.6, 0.98, 1.0], [0.75, 1.0, 0.625, 0.5]]))
    assert found.delta.tolist() == [0.125, 0.875]


def test_binomial_masks_take_r_from_zero_and_one_and_a_shifted_g() -> None:
    r = torch.tensor([[0.1, 0.9, 0.6, 0.6], [0.5, 0.7, 0.49, 0.99]])
    delta = torch.tensor([[0.3], [0.4]])
    u = torch.tensor([[0.0, 1.0, 0.16, 0.5], [1.0, 1.0, 0.0, 0.0]])
    found = mask(MaskSource.binomial, torch.cat([r, delta, u], dim=1))
    # g = clamp(1.05 z - 0.05 u): row 0: (0, 0.16, 1, 1), row 1: (0, 1, 0.525, 0); r = 1 where the draw is < ½
    assert found.mask is not None
    assert found.delta is not None
    torch.testing.assert_close(found.mask, torch.tensor([[1.0, 0.16, 1.0, 1.0], [0.0, 1.0, 1.0, 0.0]]))
    torch.testing.assert_close(found.delta, torch.tensor([0.3, 0.4]))


def test_binomial_shift_reaches_both_ends_of_the_leak() -> None:
    # At z in [0, 1] the shifted argument lies in [-0.05, 1.05].
    z, u = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
    given = torch.cat([torch.full((1, 2), 0.9), torch.zeros(1, 1), u], dim=1)
    found = draw_mask(
        MaskSource.binomial,
        causal_importance(z, Sigmoid.leaky_hard_paper),
        draws=given,
        use_delta=False,
        sigmoid=Sigmoid.leaky_hard_paper,
    )
    assert found.mask is not None
    torch.testing.assert_close(found.mask, torch.tensor([[0.01 * -0.05, 1.0]]))


@pytest.mark.parametrize("source", [MaskSource.stochastic, MaskSource.binomial])
def test_without_the_weight_delta_none_is_drawn_and_the_masks_stay_the_same(source: MaskSource) -> None:
    given = draws(source)
    without, with_delta = mask(source, given, use_delta=False), mask(source, given)
    assert without.delta is None
    assert with_delta.delta is not None
    assert with_delta.delta.shape == (2,)
    assert torch.equal(without.mask, with_delta.mask)


@pytest.mark.parametrize("source", [MaskSource.stochastic, MaskSource.binomial, MaskSource.ci])
def test_masks_lie_between_g_and_one(source: MaskSource) -> None:
    z = 3 * torch.randn(1000, C, generator=torch.Generator().manual_seed(1))
    given = torch.rand(1000, columns_needed(source, C), generator=torch.Generator().manual_seed(2))
    importances = causal_importance(z, Sigmoid.leaky_hard)
    found = draw_mask(source, importances, draws=given, use_delta=True, sigmoid=Sigmoid.leaky_hard)
    assert found.mask is not None
    assert found.mask.min() >= 0
    assert found.mask.max() <= 1
    shift = 0.05 if source is MaskSource.binomial else 0  # of g, downwards by at most this
    assert (found.mask >= importances.lower - shift - 1e-6).all()
    assert torch.equal(found.mask[z > 1.05], torch.ones_like(found.mask[z > 1.05]))


def test_a_stochastic_mask_is_uniform_on_g_to_one() -> None:
    z, n = torch.full((20_000, 1), 0.4), 20_000
    given = torch.rand(n, 2, generator=torch.Generator().manual_seed(3))
    found = draw_mask(
        MaskSource.stochastic,
        causal_importance(z, Sigmoid.leaky_hard),
        draws=given,
        use_delta=True,
        sigmoid=Sigmoid.leaky_hard,
    )
    assert found.mask is not None
    assert found.mask.mean().item() == pytest.approx(0.7, abs=4.5 * 0.6 / (12 * n) ** 0.5)
    assert found.mask.var().item() == pytest.approx(0.36 / 12, rel=0.05)


def test_the_gradient_of_a_mask_is_one_minus_r_through_the_lower_function_alone() -> None:
    z = torch.tensor([[0.5, 0.25]], requires_grad=True)
    given = torch.tensor([[0.25, 0.75, 0.5]])
    importances = causal_importance(z, Sigmoid.leaky_hard)
    found = draw_mask(
        MaskSource.stochastic, importances, draws=given, use_delta=True, sigmoid=Sigmoid.leaky_hard
    )
    assert found.mask is not None
    (gradient,) = torch.autograd.grad(found.mask.sum(), z)
    assert gradient.tolist() == [[0.75, 0.25]]


def test_columns_are_exactly_what_is_read() -> None:
    assert columns_needed(MaskSource.unmasked, C) == 0
    assert columns_needed(MaskSource.ci, C) == 0
    assert columns_needed(MaskSource.stochastic, C) == C + 1
    assert columns_needed(MaskSource.binomial, C) == 2 * C + 1
    for source in (MaskSource.stochastic, MaskSource.binomial):
        needed = columns_needed(source, C)
        with pytest.raises((IndexError, RuntimeError)):
            mask(source, torch.rand(2, needed - 1))


def test_given_sources_are_shared_along_axes_of_length_one() -> None:
    sources = torch.tensor([[0.5, 0.5, 0.5, 0.25, 0.125]])
    found = mask_from_sources(ci(), sources, use_delta=True)
    assert found.mask is not None
    assert found.delta is not None
    torch.testing.assert_close(found.mask, torch.tensor([[0.5, 0.6, 0.98, 1.0], [0.5, 1.0, 0.75, 0.25]]))
    assert found.delta.tolist() == [0.125, 0.125]
    assert mask_from_sources(ci(), sources, use_delta=False).delta is None


def test_what_is_given_in_place_of_a_mask_is_refused_with_what_to_give() -> None:
    model, x = make("sequential"), batch_of("sequential")
    mask = torch.ones(6, 9)
    wrong: list[tuple[Any, type[Exception], str]] = [
        (
            SiteMask(mask=mask.double()),
            ValueError,
            ".mask: got float64, must be float32; give it .to(torch.float32)",
        ),
        (SiteMask(mask=mask > 0), ValueError, ".mask: got bool, must be float32"),
        (SiteMask(mask=mask.tolist()), TypeError, ".mask: got a list, must be a tensor, float32"),
        (
            SiteMask(delta=1.0),
            TypeError,
            ".delta: got a float, must be a tensor, float32, as torch.tensor(…); one",
        ),
        (SiteMask(mask=mask, delta=torch.ones(6).double()), ValueError, ".delta: got float64"),
        (SiteMask(route=torch.ones(6)), ValueError, ".route: got float32, must be bool"),
        (
            SiteMask(mask=torch.ones(5, 9)),
            ValueError,
            ".mask: got one for positions [5], but what the site reads",
        ),
        (SiteMask(delta=torch.ones(5)), ValueError, "has [6]; its shape must be [6]"),
        (SiteMask(mask=torch.ones(2, 3, 9)), ValueError, "its shape must be [6, C]"),
    ]
    for given, error, message in wrong:
        with pytest.raises(error, match=re.escape(message)):
            model(x, {"middle": given})


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_models_of_other_types_take_masks_of_theirs_and_of_smaller_ones(dtype: torch.dtype) -> None:
    model, x = make("sequential").to(dtype), batch_of("sequential").to(dtype)
    half = torch.full((6, 9), 0.5, dtype=torch.bfloat16)
    same = [model(x, {"middle": SiteMask(mask=mask)}) for mask in (half, half.to(dtype))]
    assert torch.equal(*same)
    assert same[0].dtype == dtype
    assert model.ablated(x, {"middle": [0], "last": 1}).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        model(x, {"middle": SiteMask(mask=half.float())})
