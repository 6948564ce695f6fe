"""Which subcomponents of a site are worth a column in a picture, and in which order."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Int

from spd_hydra.counted import counted
from spd_hydra.metric.evaluation import Evaluation, SiteCheck, SiteEvaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ALL_UP_TO = 60  # sites with at most so many subcomponents are shown whole
NAMED_UP_TO = 24
LONGER_NAMED_UP_TO = 12  # of indices with more than two digits
LIMIT = 400  # columns that can still be told apart at the width of a panel


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The subcomponents to show, in the order of the site, and a note about those left out."""

    shown: Int[np.ndarray, " shown"]
    note: str


def checks_of(evaluation: Evaluation, site: str) -> list[SiteCheck]:
    """The checks of one site, the strictest tolerance first."""
    return sorted((c for c in evaluation.checks if c.site == site), key=lambda check: check.tolerance)


def expected_of(evaluation: Evaluation, site: str) -> int | None:
    """The number of subcomponents that the known answer has at this site, or None without one."""
    found = checks_of(evaluation, site)
    return found[0].expected if found else None


def columns_of(site: SiteEvaluation, expected: int | None) -> Columns:
    """Choose columns: all of a small site, else the expected first ones and every further alive one."""
    order = np.asarray(site.order)
    if len(order) <= ALL_UP_TO:
        return Columns(shown=order, note="")
    alive = np.asarray(site.density)[order] > 0
    kept = order[alive | (np.arange(len(order)) < (expected or 0))]
    if len(kept) == 0:
        kept = order[:ALL_UP_TO]
    shown = kept[:LIMIT]
    left_out, alive_left_out = (
        len(order) - len(shown),
        int(alive.sum()) - int((site.density[shown] > 0).sum()),
    )
    if not left_out:
        return Columns(shown=shown, note="")
    what = f"{alive_left_out:,} of them alive" if alive_left_out else "none of them alive"
    return Columns(
        shown=shown, note=f"{counted(left_out, 'subcomponent')} of {len(order):,} left out, {what}"
    )


def label_columns(axes: "Axes", columns: Columns) -> None:
    """Frame an image of these columns, ticks naming the subcomponents, or every n-th where not all fit."""
    from matplotlib.ticker import MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    digits = len(str(columns.shown.max(initial=0)))
    every = -(-len(columns.shown) // (NAMED_UP_TO if digits <= 2 else LONGER_NAMED_UP_TO))
    places = range(0, len(columns.shown), max(every, 1))
    axes.set_xticks(places, [str(columns.shown[place]) for place in places])
    axes.tick_params(axis="x", labelsize=7.5)
    axes.set_xlabel("subcomponent" if every <= 1 else f"subcomponent (1 in {every} named)")
    for spine in axes.spines.values():
        spine.set_visible(True)


def wrong_entries(check: SiteCheck, importances: np.ndarray) -> Bool[np.ndarray, "n_features shown"]:
    """The entries of an ordered probe heatmap that a check counts as errors; their number is its error.

    identity(n): off the diagonal above the tolerance, on it below 1 − tolerance. dense(k): any entry above
    the tolerance beyond the first k columns, and one entry for each of those k without one ≥ 1 − tolerance.

    Args:
        importances: g of each feature's probe, `[n_features, shown]`, columns in the order of the site.
    """
    wrong = importances > check.tolerance
    if check.name == "identity":
        diagonal = np.arange(min(importances.shape))
        wrong[diagonal, diagonal] = importances[diagonal, diagonal] < 1 - check.tolerance
        return wrong
    needed = min(check.expected, importances.shape[1])
    wrong[:, :needed] = False
    lacking = np.flatnonzero(importances[:, :needed].max(axis=0) < 1 - check.tolerance)
    wrong[importances[:, lacking].argmax(axis=0), lacking] = True
    return wrong
