"""Two decompositions side by side: the same subcomponents are found again, others are not alike."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from spd_hydra.explore.matching import best_matching, cosines


def random_pieces(seed: int, C: int = 6, d_in: int = 7, d_out: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(d_in, C, generator=generator), torch.randn(C, d_out, generator=generator)


def test_cosines_are_those_of_the_matrices_themselves() -> None:
    V, U = random_pieces(0)
    other_V, other_U = random_pieces(1, C=3)
    found = cosines(V, U, other_V, other_U)
    for c, d in itertools.product(range(6), range(3)):
        one, other = torch.outer(V[:, c], U[c]).double(), torch.outer(other_V[:, d], other_U[d]).double()
        expected = (one * other).sum() / one.norm() / other.norm()
        assert float(found[c, d]) == pytest.approx(float(expected), abs=1e-6)


def test_a_permuted_rescaled_copy_is_matched_to_itself_with_the_sign_of_each_matrix() -> None:
    V, U = random_pieces(0)
    order = [3, 0, 5, 1, 4, 2]
    sign_of_both = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])  # leaves V_c U_c as it is
    sign_of_one = torch.tensor([1.0, 1.0, -1.0, 1.0, 1.0, -1.0])
    other_V, other_U = (
        3 * V[:, order] * sign_of_both,
        U[order] * sign_of_both[:, None] * sign_of_one[:, None],
    )
    found = best_matching(cosines(V, U, other_V, other_U))
    assert found.own == [0, 1, 2, 3, 4, 5]
    assert [order[d] for d in found.other] == found.own
    assert found.cosines == pytest.approx([float(sign_of_one[d]) for d in found.other])
    assert found.mean == pytest.approx(1)


def test_the_sum_of_absolute_cosines_is_the_largest_of_all_assignments() -> None:
    of_all = cosines(*random_pieces(2, C=4), *random_pieces(3, C=4))
    found = best_matching(of_all)
    sums = [
        sum(abs(float(of_all[c, d])) for c, d in enumerate(other))
        for other in itertools.permutations(range(4))
    ]
    assert sum(map(abs, found.cosines)) == pytest.approx(max(sums))


def test_independent_random_matrices_of_many_dimensions_are_not_alike() -> None:
    found = best_matching(cosines(*random_pieces(4, 8, 400, 300), *random_pieces(5, 8, 400, 300)))
    assert len(found.own) == 8
    assert found.mean < 0.05


def test_only_candidates_are_matched_and_the_rest_of_the_larger_number_is_not() -> None:
    V, U = random_pieces(0)
    found = best_matching(cosines(V, U, V, U), own=[1, 4, 5], other=[5, 1])
    assert (found.own, found.other, found.candidates) == ([1, 5], [1, 5], (3, 2))
    assert repr(found) == "Matching(2 pairs of 3 and 2, mean |cosine| 1.000)"
    assert found.table().splitlines() == [
        "own  other  cosine",
        "───  ─────  ──────",
        "  1      1   1.000",
        "  5      5   1.000",
    ]


def test_without_candidates_there_is_no_pair_and_a_zero_matrix_is_like_none() -> None:
    V, U = random_pieces(0)
    found = best_matching(cosines(V, U, V, U), own=[], other=[1])
    assert found.own == []
    assert math.isnan(found.mean)
    assert cosines(V, 0 * U, V, U).tolist() == [[0.0] * 6] * 6
