"""Symptoms of a decomposition that is not the known answer, each a measurement with its threshold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from spd_hydra.metric.evaluation import SiteEvaluation
from spd_hydra.metric.known_answer import TOLERANCE

Rows = Sequence[Mapping[str, Any]]  # of metrics.jsonl

LAST_QUARTER = 0.25
# Solved runs of the 5-feature presets lose at most 1 % of L0 over the last quarter, on the same data.
LEAST_FALL = 0.05
STANDARD_ERRORS = 3.0  # a slope within the noise of training batches is none
# Late collapse multiplies this norm by a hundred, while a falling rate only shrinks it.
LEAST_JUMP = 100.0
LAST_ROWS, LEAST_ROWS = 3, 10
_MEASURED_WITH = ("n_positions", "ci_threshold")
# Five features of which one is at 0.95 and the others perfect give the least MMCS that counts, 0.99.
LEAST_COSINE = 0.95


class Fall(NamedTuple):
    """L0 at two steps, the later one the last of training; `share` is what it lost, per quarter of it."""

    first_step: int
    last_step: int
    first: float
    last: float
    share: float


class Jump(NamedTuple):
    """Gradient norm of the causal-importance function: its median, and that of the last rows."""

    median: float
    last: float


class Shared(NamedTuple):
    """One subcomponent that several features need, each with its g."""

    subcomponent: int
    features: list[int]
    g: list[float]


class Split(NamedTuple):
    """One feature that needs several subcomponents, each with its g."""

    feature: int
    subcomponents: list[int]
    g: list[float]


class Lone(NamedTuple):
    """A subcomponent of a dense site, beyond as many as it should have, that one feature alone needs."""

    subcomponent: int
    feature: int
    g: float


@dataclass(frozen=True, kw_only=True)
class IdentitySymptoms:
    """A site that should have one subcomponent for each feature, seen on single features.

    On is g > tolerance, near 1 is g ≥ 1 - tolerance. `unserved` features have no subcomponent near 1, and
    `largest` is the largest g among theirs; `per_feature` and `undecided` are means over features, of the
    subcomponents that are on, and of those between off and near 1 beside a feature's largest.
    """

    unserved: list[int]
    largest: float
    per_feature: float
    undecided: float
    shared: list[Shared]
    split: list[Split]


def identity_symptoms(g: Float[np.ndarray, "n_features C"], tolerance: float = TOLERANCE) -> IdentitySymptoms:
    """What is wrong with the causal importances of an identity site; everything empty where nothing is."""
    on, near = g > tolerance, g >= 1 - tolerance
    best = g.max(axis=1)
    unserved = np.flatnonzero(best < 1 - tolerance)
    undecided = on & ~near
    undecided[np.arange(len(g)), g.argmax(axis=1)] = False
    shared = [
        Shared(int(c), [int(j) for j in np.flatnonzero(near[:, c])], [float(x) for x in g[near[:, c], c]])
        for c in np.flatnonzero(near.sum(axis=0) > 1)
    ]
    split = [
        Split(int(j), [int(c) for c in np.flatnonzero(on[j])], [float(x) for x in g[j, on[j]]])
        for j in np.flatnonzero(on.sum(axis=1) > 1)
    ]
    return IdentitySymptoms(
        unserved=[int(j) for j in unserved],
        largest=float(best[unserved].max()) if len(unserved) else 0.0,
        per_feature=float(on.sum(axis=1).mean()),
        undecided=float(undecided.sum(axis=1).mean()),
        shared=sorted(shared, key=lambda one: -len(one.features)),
        split=split,
    )


def needed(g: Float[np.ndarray, "n_features C"], expected: int, tolerance: float = TOLERANCE) -> int:
    """How many subcomponents a dense site needs: by that many it is off from `expected` as the check counts.

    Of the `expected` heaviest those near 1 on some feature, of the others those that are on for some.
    """
    order = np.argsort(-g.sum(axis=0), kind="stable")
    peak = g.max(axis=0)[order]
    return int((peak[:expected] >= 1 - tolerance).sum() + (peak[expected:] > tolerance).sum())


def lone(g: Float[np.ndarray, "n_features C"], expected: int, tolerance: float = TOLERANCE) -> list[Lone]:
    """Of a dense site, all but the `expected` heaviest subcomponents that are on for exactly one feature."""
    order = np.argsort(-g.sum(axis=0), kind="stable")
    found = [(int(c), np.flatnonzero(g[:, c] > tolerance)) for c in np.sort(order[expected:])]
    return [Lone(c, int(on[0]), float(g[on[0], c])) for c, on in found if len(on) == 1]


def fall_of_l0(history: Rows) -> Fall | None:
    """The fall of the total L0 at the end of training, if it still falls there; None if it does not.

    From evaluations like the last, whose data are the same each time: those of the last quarter, or the last
    two if it has fewer. Without two, from a line through the training rows of the last half, if its slope is
    no noise.
    """
    measured = _points(_like_the_last(history), "eval", "l0/total")
    if len(measured) >= 2:
        end = measured[-1][0]
        late = [point for point in measured if point[0] >= end * (1 - LAST_QUARTER)]
        (start, first), (_, last) = late[0] if len(late) > 1 else measured[-2], measured[-1]
    else:
        rows = _points(history, "train", "l0/total")
        end = rows[-1][0] if rows else 0
        late = [point for point in rows if point[0] >= end / 2]
        if len(late) < 4:
            return None
        line = _line(late)
        if line is None:
            return None
        start, (first, last) = late[0][0], line
    if first <= 0 or end <= start:
        return None
    quarters = max((end - start) / (LAST_QUARTER * end), 1.0)
    share = 1 - max(last / first, 0.0) ** (1 / quarters)
    return Fall(start, end, first, last, share) if share >= LEAST_FALL else None


def jump_of_gradient(history: Rows) -> Jump | None:
    """The jump of the causal-importance function's gradient norm in the last rows, if there is one."""
    norms = [value for _, value in _points(history, "train", "grad_norm/ci_fn")]
    if len(norms) < LEAST_ROWS:
        return None
    median, last = float(np.median(norms)), float(np.median(norms[-LAST_ROWS:]))
    return Jump(median, last) if median > 0 and last >= LEAST_JUMP * median else None


def best_cosines(site: SiteEvaluation) -> Float[np.ndarray, " n_features"]:
    """For each feature the largest cosine between its column of W and what a subcomponent makes of it.

    As in MMCS, which is its mean; empty for a site without known directions.
    """
    if site.directions is None:
        return np.zeros(0)
    wanted = site.directions @ site.weight.T
    gain = site.directions @ site.V
    sizes = np.abs(gain) * np.linalg.norm(site.U, axis=1) * np.linalg.norm(wanted, axis=1, keepdims=True)
    cosine = gain * (wanted @ site.U.T) / np.maximum(sizes, np.finfo(float).tiny)
    best: np.ndarray = cosine.max(axis=1)
    return best


def _like_the_last(history: Rows) -> Rows:
    """Evaluations on as many positions and with the same threshold as the last: a resume may change both."""
    rows = [row for row in history if row.get("split") == "eval"]
    return [row for row in rows if all(row.get(key) == rows[-1].get(key) for key in _MEASURED_WITH)]


def _points(history: Rows, split: str, name: str) -> list[tuple[int, float]]:
    """Steps and finite values of one quantity in the order of the steps, the last row of a step counting."""
    found = {
        int(row["step"]): float(row[name])
        for row in history
        if row.get("split") == split and isinstance(row.get(name), int | float) and np.isfinite(row[name])
    }
    return sorted(found.items())


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float] | None:
    """Both ends of the least-squares line if it falls by more than its standard errors allow."""
    x, y = np.array(points, dtype=float).T
    centred = x - x.mean()
    slope = float((centred * y).sum() / (centred**2).sum())
    fitted = y.mean() + slope * centred
    error = np.sqrt(((y - fitted) ** 2).sum() / (len(x) - 2) / (centred**2).sum())
    return (float(fitted[0]), float(fitted[-1])) if -slope > STANDARD_ERRORS * error else None
