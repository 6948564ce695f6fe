"""MMCS and ML2R against cases worked out by hand."""

import math

import pytest
import torch
from torch import Tensor

from spd_hydra.metric.recovery import recovery

# Two features in the plane: columns (2, 0) and (0, 4).
WEIGHT = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
ONE_HOT = torch.eye(2)


def reading_and_writing(*pieces: tuple[list[float], list[float]]) -> tuple[Tensor, Tensor]:
    """V: [d_in, C] and U: [C, d_out] of (reading vector, writing vector) pairs."""
    V = torch.tensor([reads for reads, _ in pieces]).T
    return V, torch.tensor([writes for _, writes in pieces])


def test_the_columns_themselves_are_recovered_perfectly() -> None:
    V, U = reading_and_writing(([1.0, 0.0], [2.0, 0.0]), ([0.0, -2.0], [0.0, -2.0]))
    assert recovery(WEIGHT, V, U, ONE_HOT) == pytest.approx((1.0, 1.0, 1.0))


def test_norm_and_direction_are_measured_apart() -> None:
    # Feature 0: half the size. Feature 1: 45 degrees off, of norm 6.
    V, U = reading_and_writing(([1.0, 0.0], [1.0, 0.0]), ([0.0, 1.0], [18**0.5, 18**0.5]))
    found = recovery(WEIGHT, V, U, ONE_HOT)
    assert found.mmcs == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert found.ml2r == pytest.approx((0.5 + 1.5) / 2)
    assert found.ml2r_plain == pytest.approx(found.ml2r)


def test_a_dead_sliver_with_a_better_cosine_does_not_count_for_the_size() -> None:
    angle = 0.1  # cos = 0.995, within 0.01 of the sliver's 1
    V, U = reading_and_writing(
        ([1.0, 0.0], [2 * math.cos(angle), 2 * math.sin(angle)]),
        ([1.0, 0.0], [0.02, 0.0]),
        ([0.0, 1.0], [0.0, 4.0]),
    )
    found = recovery(WEIGHT, V, U, ONE_HOT)
    assert found.mmcs == pytest.approx(1.0)
    assert found.ml2r == pytest.approx(1.0)
    assert found.ml2r_plain == pytest.approx((0.01 + 1) / 2)


def test_a_larger_piece_too_far_from_the_best_cosine_does_not_count() -> None:
    angle = 0.2  # cos = 0.980, more than 0.01 below
    V, U = reading_and_writing(
        ([1.0, 0.0], [20 * math.cos(angle), 20 * math.sin(angle)]),
        ([1.0, 0.0], [1.0, 0.0]),
        ([0.0, 1.0], [0.0, 4.0]),
    )
    assert recovery(WEIGHT, V, U, ONE_HOT).ml2r == pytest.approx((0.5 + 1) / 2)


def test_a_piece_that_points_the_other_way_is_not_a_match() -> None:
    V, U = reading_and_writing(([1.0, 0.0], [-2.0, 0.0]), ([0.0, 1.0], [0.0, 4.0]))
    found = recovery(WEIGHT, V, U, ONE_HOT)
    # The second piece offers nothing to feature 0: cosine 0 beats -1, with a norm of 0.
    assert found == pytest.approx((0.5, 0.5, 0.5))


def test_a_sign_shared_by_reading_and_writing_cancels() -> None:
    V, U = reading_and_writing(([-1.0, 0.0], [-2.0, 0.0]), ([0.0, 1.0], [0.0, 4.0]))
    assert recovery(WEIGHT, V, U, ONE_HOT) == pytest.approx((1.0, 1.0, 1.0))


def test_pieces_that_are_zero_give_zeros_not_nan() -> None:
    assert recovery(WEIGHT, torch.zeros(2, 3), torch.zeros(3, 2), ONE_HOT) == (0.0, 0.0, 0.0)


def test_features_that_reach_the_site_along_directions_are_compared_there() -> None:
    # One feature along (3, 4)/5, whose column of the matrix is W d = (1.2, 3.2).
    direction = torch.tensor([[0.6, 0.8]])
    V, U = reading_and_writing(([0.6, 0.8], [1.2, 3.2]), ([1.0, 0.0], [2.0, 0.0]))
    assert recovery(WEIGHT, V, U, direction) == pytest.approx((1.0, 1.0, 1.0))
