"""Target-CI errors against a search over all matchings."""

import itertools

import numpy as np
import pytest

from spd_hydra.metric.target_ci import dense_error, identity_error

IDENTITY = np.eye(3, 4)


def errors_of(g: np.ndarray, columns: tuple[int, ...], tolerance: float) -> int:
    """Contradictions to "feature i has column columns[i]", counted entry by entry."""
    count = 0
    for feature in range(g.shape[0]):
        for column in range(g.shape[1]):
            if columns[feature] == column:
                count += g[feature, column] < 1 - tolerance
            else:
                count += g[feature, column] > tolerance
    return count


@pytest.mark.parametrize("seed", range(20))
def test_identity_error_is_that_of_the_heaviest_matching(seed: int) -> None:
    g = np.random.default_rng(seed).random((3, 5))
    matchings = list(itertools.permutations(range(5), 3))
    heaviest = max(matchings, key=lambda columns: sum(g[i, c] for i, c in enumerate(columns)))
    found = identity_error(g, 0.2)
    assert found.error == errors_of(g, heaviest, 0.2)
    assert tuple(found.order[:3]) == heaviest


@pytest.mark.parametrize("tolerance", [0.1, 0.2])
@pytest.mark.parametrize("seed", range(40))
def test_identity_error_is_zero_exactly_where_some_matching_has_none(seed: int, tolerance: float) -> None:
    generator = np.random.default_rng(seed)
    g = np.eye(3, 4)[:, generator.permutation(4)]
    noise = generator.random(g.shape) * (0.22 if seed % 2 else 0.09)
    g = np.where(g > 0.5, 1 - noise, noise)
    best = min(errors_of(g, columns, tolerance) for columns in itertools.permutations(range(4), 3))
    assert (identity_error(g, tolerance).error == 0) == (best == 0)


def test_the_order_of_columns_does_not_matter() -> None:
    shuffled = IDENTITY[:, [3, 1, 0, 2]]
    found = identity_error(shuffled, 0.1)
    assert found.error == 0
    assert np.array_equal(shuffled[:, found.order], IDENTITY)


def test_unmatched_columns_follow_the_heaviest_first() -> None:
    g = np.array([[0.0, 0.1, 1.0, 0.3], [0.0, 0.1, 0.0, 0.3]])
    assert list(identity_error(g, 0.2).order) == [2, 3, 1, 0]


@pytest.mark.parametrize(
    ("entry", "value", "errors"),
    [
        ((0, 0), 0.8, 0),  # exactly 1 - tolerance passes
        ((0, 0), 0.79, 1),
        ((0, 1), 0.2, 0),  # exactly the tolerance passes
        ((0, 1), 0.21, 1),
        ((2, 3), 0.5, 1),  # a column that belongs to no feature
    ],
)
def test_identity_counts_an_entry_just_beyond_the_tolerance(
    entry: tuple[int, int], value: float, errors: int
) -> None:
    g = IDENTITY.copy()
    g[entry] = value
    assert identity_error(g, 0.2).error == errors


def test_features_without_a_column_count_as_errors() -> None:
    assert identity_error(np.eye(4, 2), 0.1).error == 2
    assert identity_error(np.zeros((3, 0)), 0.1).error == 3


def test_two_features_on_one_column_count_for_both() -> None:
    # Feature 1 has nothing of its own (1 error), and uses feature 0's column (1 error).
    g = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert identity_error(g, 0.1).error == 2


def brute_dense_error(g: np.ndarray, k: int, tolerance: float) -> int:
    """The definition, entry by entry, with columns sorted by their sums."""
    by_weight = sorted(range(g.shape[1]), key=lambda column: -g[:, column].sum())
    idle = sum(all(entry < 1 - tolerance for entry in g[:, column]) for column in by_weight[:k])
    superfluous = sum(entry > tolerance for column in by_weight[k:] for entry in g[:, column])
    return int(idle + superfluous)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("k", [1, 2, 4])
def test_dense_error_is_its_definition(seed: int, k: int) -> None:
    g = np.random.default_rng(seed).random((6, 4)) ** 3
    assert dense_error(g, k, 0.2).error == brute_dense_error(g, k, 0.2)


def test_dense_columns_may_serve_any_features() -> None:
    g = np.array([[1.0, 0.0, 0.4], [0.7, 0.0, 0.95]])
    assert dense_error(g, 2, 0.1).error == 0
    assert list(dense_error(g, 2, 0.1).order) == [0, 2, 1]


@pytest.mark.parametrize(
    ("entry", "value", "errors"), [((0, 0), 0.8, 0), ((0, 0), 0.79, 1), ((1, 2), 0.2, 0), ((1, 2), 0.21, 1)]
)
def test_dense_counts_an_entry_just_beyond_the_tolerance(
    entry: tuple[int, int], value: float, errors: int
) -> None:
    g = np.array([[1.0, 0.0, 0.0], [0.7, 1.0, 0.0]])
    g[entry] = value
    assert dense_error(g, 2, 0.2).error == errors


def test_every_active_entry_of_a_superfluous_column_counts() -> None:
    g = np.array([[1.0, 1.0, 0.9], [1.0, 1.0, 0.9]])
    assert dense_error(g, 2, 0.1).error == 2


def test_needed_columns_that_do_not_exist_count_as_errors() -> None:
    assert dense_error(np.ones((3, 2)), 5, 0.1).error == 3
