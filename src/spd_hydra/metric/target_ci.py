"""Target-CI error: how far causal importances on single-feature inputs are from the known pattern."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int


class Match(NamedTuple):
    """`error`: entries that contradict the pattern, 0: found. `order`: subcomponents, matched ones first."""

    error: int
    order: Int[np.ndarray, " C"]


def identity_error(g: Float[np.ndarray, "n_features C"], tolerance: float) -> Match:
    """Distance from "each feature has one subcomponent of its own".

    Columns are matched to features so that the matched entries sum to the most. The error counts
    matched entries < 1 - tolerance, other entries > tolerance, and features left without a column.

    Args:
        g: lower causal importance of every subcomponent on each feature alone.
        tolerance: how far from 0 and 1 an entry may be.
    """
    from scipy.optimize import linear_sum_assignment

    features, columns = linear_sum_assignment(g, maximize=True)
    matched = np.zeros(g.shape, dtype=bool)
    matched[features, columns] = True
    missing = g.shape[0] - len(features)
    error = int((g[matched] < 1 - tolerance).sum() + (g[~matched] > tolerance).sum()) + missing
    rest = np.setdiff1d(np.arange(g.shape[1]), columns)
    heaviest_first = rest[np.argsort(-g[:, rest].sum(0), kind="stable")]
    return Match(error, np.concatenate([columns, heaviest_first]))


def dense_error(g: Float[np.ndarray, "n_features C"], k: int, tolerance: float) -> Match:
    """Distance from "k subcomponents carry the site, and no other is ever needed".

    The k heaviest columns each need an entry ≥ 1 - tolerance; every entry > tolerance of another
    column is an error, and so is each of the k that does not exist.

    Args:
        g: lower causal importance of every subcomponent on each feature alone.
        k: how many subcomponents should be needed.
        tolerance: how far from 0 and 1 an entry may be.
    """
    order = np.argsort(-g.sum(0), kind="stable")
    heavy, light = order[:k], order[k:]
    idle = int((g[:, heavy].max(0) < 1 - tolerance).sum()) + max(k - g.shape[1], 0)
    return Match(idle + int((g[:, light] > tolerance).sum()), order)
