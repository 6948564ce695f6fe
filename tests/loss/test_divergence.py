"""Distances between outputs, worked out by hand."""

import math

import pytest
import torch

from spd_hydra.loss.divergence import Divergence, divergence_sum


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


@pytest.mark.parametrize("divergence", Divergence)
def test_equal_outputs_are_at_distance_zero(divergence: Divergence) -> None:
    output = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert value(divergence, output, output) == 0


def test_kl_survives_classes_of_probability_zero() -> None:
    target, masked = torch.tensor([[0.0, -200.0]]), torch.tensor([[0.0, 0.0]])
    assert value(Divergence.kl, masked, target) == pytest.approx(math.log(2))


@pytest.mark.parametrize("divergence", Divergence)
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


@pytest.mark.parametrize("divergence", Divergence)
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
