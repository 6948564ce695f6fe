"""Distances between outputs, worked out by hand."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from spd_hydra.loss import divergence as module
from spd_hydra.loss.divergence import (
    Divergence,
    divergence_by_row,
    divergence_sum,
    kl_by_position,
    log_normaliser,
)


def value(divergence: Divergence, masked: torch.Tensor, target: torch.Tensor) -> float:
    total, count = divergence_sum(divergence, masked, target)
    return float(total) / float(count)


def test_mse_is_the_mean_over_all_output_elements() -> None:
    masked, target = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[0.0, 2.0], [2.0, 1.0]])
    # (1 + 0 + 4 + 4) / 4
    assert value(Divergence.mse, masked, target) == 2.25
    assert value(Divergence.mse, masked.reshape(1, 2, 2), target.reshape(1, 2, 2)) == 2.25


def test_kl_is_of_the_target_from_the_masked_summed_over_classes_mean_over_positions() -> None:
    # position 0: p = (1/2, 1/2), q = (1/4, 3/4); position 1: p = (1/5, 4/5), q = (1/2, 1/2)
    target = torch.tensor([[0.0, 0.0], [0.0, math.log(4)]])
    masked = torch.tensor([[7.0, 7.0 + math.log(3)], [-1.0, -1.0]])
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    second = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    assert value(Divergence.kl, masked, target) == pytest.approx((first + second) / 2, rel=1e-5)
    assert divergence_sum(Divergence.kl, masked.reshape(1, 2, 2), target.reshape(1, 2, 2))[1] == 2


@pytest.mark.parametrize("divergence", [Divergence.mse, Divergence.kl])
def test_equal_outputs_are_at_distance_zero(divergence: Divergence) -> None:
    output = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert value(divergence, output, output) == 0


def test_kl_survives_classes_of_probability_zero() -> None:
    target, masked = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, 0.0]])
    assert value(Divergence.kl, masked, target) == pytest.approx(math.log(2))


@pytest.mark.parametrize("divergence", [Divergence.mse, Divergence.kl])
def test_half_precision_outputs_are_compared_in_float32_also_under_autocast(divergence: Divergence) -> None:
    generator = torch.Generator().manual_seed(0)
    masked, target = (3 * torch.randn(50, 30, generator=generator).bfloat16() for _ in range(2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = divergence_sum(divergence, masked, target)
    assert total.dtype == torch.float32
    if divergence is Divergence.mse:
        expected = (masked.double() - target.double()).square().sum()
    else:
        p, q = target.double().softmax(-1), masked.double().softmax(-1)
        expected = (p * (p.log() - q.log())).sum()
    assert float(total) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("divergence", [Divergence.mse, Divergence.kl])
def test_padding_counts_neither_in_the_sum_nor_in_the_number(divergence: Divergence) -> None:
    generator = torch.Generator().manual_seed(0)
    masked, target = (torch.randn(2, 3, 4, generator=generator) for _ in range(2))
    valid = torch.tensor([[True, True, False], [True, False, False]])
    masked[~valid] = math.nan  # whatever a model makes of padding
    total, count = divergence_sum(divergence, masked, target, valid)
    wanted, number = divergence_sum(divergence, masked[valid], target[valid])
    assert float(total) == pytest.approx(float(wanted), rel=1e-6)
    assert int(count) == number


def test_an_output_that_is_not_per_position_counts_whole() -> None:
    masked, target = torch.ones(2, 4), torch.zeros(2, 4)
    total, count = divergence_sum(Divergence.mse, masked, target, torch.zeros(2, 3, dtype=torch.bool))
    assert float(total) / int(count) == 1


def test_sums_by_row_are_those_of_each_row_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    masked, target = (torch.randn(3, 4, 5, generator=generator) for _ in range(2))
    valid = torch.rand(3, 4, generator=generator) < 0.7
    for divergence in (Divergence.mse, Divergence.kl):
        found = divergence_by_row(divergence, masked, target, valid)
        wanted = [divergence_sum(divergence, masked[i], target[i], valid[i])[0] for i in range(3)]
        torch.testing.assert_close(found, torch.stack(wanted))


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", 70)  # of 11 classes: 6 positions at a time


def logits(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    masked, target = (4 * torch.randn(*shape, 11, generator=generator) for _ in range(2))
    return masked.to(dtype).requires_grad_(), target.to(dtype)


def in_double(
    masked: torch.Tensor, target: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """KL at each position, and the gradient of its weighted sum, by the definition."""
    own = masked.detach().double().requires_grad_()
    p, q = target.double().softmax(-1), own.softmax(-1)
    kl = (p * (p.log() - q.log())).sum(-1)
    return kl.detach(), torch.autograd.grad((kl * weight).sum(), own)[0]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("shape", [(20,), (2, 7), (1, 1), (4, 25)])
def test_in_chunks_kl_and_its_gradient_are_those_of_the_whole(shape: tuple[int, ...]) -> None:
    masked, target = logits(*shape)
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    kl, wanted = in_double(masked, target, weight)
    found = kl_by_position(masked, target)
    torch.testing.assert_close(found.double(), kl, rtol=2e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad((found * weight).sum(), masked)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-6, atol=5e-7)


@pytest.mark.usefixtures("small_chunks")
def test_large_outputs_are_compared_in_chunks_and_padding_still_counts_nowhere() -> None:
    masked, target = logits(4, 25)
    valid = torch.rand(4, 25, generator=torch.Generator().manual_seed(1)) < 0.6
    kl, wanted = in_double(masked, target, valid)
    total, count = divergence_sum(Divergence.kl, masked, target, valid)
    assert total.item() == pytest.approx(kl[valid].sum().item(), rel=1e-6)
    assert int(count) == int(valid.sum())
    (gradient,) = torch.autograd.grad(total, masked)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-6, atol=5e-7)
    assert not gradient[~valid].any()


@pytest.mark.usefixtures("small_chunks")
def test_chunks_of_half_precision_are_compared_in_float32_also_under_autocast() -> None:
    masked, target = logits(20, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kl_by_position(masked, target)
    assert found.dtype == torch.float32
    kl, wanted = in_double(masked, target, torch.ones(20))
    torch.testing.assert_close(found.double(), kl, rtol=2e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(found.sum(), masked)
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), wanted, rtol=5e-3, atol=1e-6)


@pytest.mark.usefixtures("small_chunks")
def test_chunks_may_be_mapped_over_replicas() -> None:
    masked, target = logits(3, 20)
    found = torch.vmap(kl_by_position)(masked, target)
    kl, wanted = in_double(masked, target, torch.ones(3, 20))
    torch.testing.assert_close(found.double(), kl, rtol=2e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(found.sum(), masked)
    torch.testing.assert_close(gradient.double(), wanted, rtol=2e-6, atol=5e-7)
    transformed = torch.vmap(torch.func.grad(lambda m, t: kl_by_position(m, t).sum()))(
        masked.detach(), target
    )
    torch.testing.assert_close(transformed, gradient)


def test_a_normaliser_that_passes_share_changes_nothing() -> None:
    masked, target = logits(4, 5)
    alone = kl_by_position(masked, target)
    assert torch.equal(kl_by_position(masked, target, log_normaliser(target)), alone)


def test_a_constant_that_is_added_to_all_logits_costs_no_digits() -> None:
    masked, target = ((8 * x.detach()).round() / 8 for x in logits(4, 5))  # so that the sums are exact
    kl, _ = in_double(masked, target, torch.ones(4, 5))
    found = kl_by_position(masked + 1024, target - 1024)
    torch.testing.assert_close(found.double(), kl, rtol=2e-6, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_have_the_same_value_and_gradient(dtype: torch.dtype) -> None:
    masked, target = logits(20, dtype=dtype)
    found = kl_by_position(masked, target, compiled=True)
    kl, wanted = in_double(masked, target, torch.ones(20))
    torch.testing.assert_close(found.double(), kl, rtol=2e-6, atol=2e-6)
    (gradient,) = torch.autograd.grad(found.sum(), masked)
    assert gradient.dtype == dtype
    tolerance = {"rtol": 2e-6, "atol": 5e-7} if dtype is torch.float32 else {"rtol": 5e-3, "atol": 1e-6}
    torch.testing.assert_close(gradient.double(), wanted, **tolerance)


def most_allocated(action: Callable[[], object]) -> int:
    """Most bytes that the tensors made in an action take at a time."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as watched:
        kept = action()
    assert watched.profiler is not None
    assert kept is not None
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return int(max(itertools.accumulate(sizes)))


def test_chunks_need_less_memory_than_three_copies_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    masked, target = (torch.randn(2048, 500, generator=generator) for _ in range(2))
    copy = 4 * masked.numel()

    def gradient() -> torch.Tensor:
        own = masked.detach().requires_grad_()
        total, _ = divergence_sum(Divergence.kl, own, target)
        return torch.autograd.grad(total, own)[0]

    whole, plain = most_allocated(gradient), gradient()
    monkeypatch.setattr(module, "_NUMBERS_AT_ONCE", masked.numel() // 32)
    chunks = most_allocated(gradient)
    torch.testing.assert_close(gradient(), plain)
    print(f"{whole / copy:.2f} copies of the logits as a whole, {chunks / copy:.2f} in chunks")
    assert whole > 3 * copy
    assert chunks < 1.6 * copy  # one of them the gradient
