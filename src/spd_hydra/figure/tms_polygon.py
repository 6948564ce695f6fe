"""Sites with two hidden dimensions as arrows in the plane: target, sum of subcomponents, each of them."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from spd_hydra.figure.base import History, figure
from spd_hydra.figure.style import FAINT, MUTED, WIDTH, colour_of, new_figure, plain
from spd_hydra.metric.evaluation import Evaluation, SiteEvaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_FEATURES = 24
SMALL_ROWS, SMALL_COLUMNS = 2, 4  # panels for single subcomponents beside the two large ones
UNIT = WIDTH / (SMALL_COLUMNS + 2 * SMALL_ROWS)


@figure(
    "tms_polygon",
    "Each feature's direction in the two hidden dimensions: the sum should repeat the target, and in a "
    "solved run each large subcomponent holds one of its arrows while the others shrink to the centre.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """Paper, Figures 1, 2 and 4: target columns, their reconstruction, and the subcomponents by norm."""
    vectors = {name: found for name, site in evaluation.sites.items() if (found := plane_vectors(site))}
    if not vectors:
        return None
    picture = new_figure(height=(SMALL_ROWS * UNIT + 0.75) * len(vectors))
    parts = np.atleast_1d(np.asarray(picture.subfigures(len(vectors), 1)))
    for part, (name, (target, subcomponents)) in zip(parts, vectors.items(), strict=True):
        _draw_site(part, name, evaluation.sites[name], target, subcomponents)
    return picture


def plane_vectors(
    site: SiteEvaluation,
) -> tuple[Float[np.ndarray, "n_features 2"], Float[np.ndarray, "C n_features 2"]] | None:
    """The features' vectors in the hidden plane, for the target and each subcomponent.

    With two outputs these are the columns of the weight matrix (in the basis of the features' directions
    where those are known), with two inputs its rows. None for other shapes and for too many features.
    """
    d_out, d_in = site.weight.shape
    if d_out == 2:
        basis = np.eye(d_in) if site.directions is None else site.directions
        target = basis @ site.weight.T
        subcomponents = np.einsum("jc,co->cjo", basis @ site.V, site.U)
    elif d_in == 2:
        target = site.weight
        subcomponents = np.einsum("ic,co->coi", site.V, site.U)
    else:
        return None
    return (target, subcomponents) if len(target) <= MOST_FEATURES else None


def _draw_site(
    part: Any, name: str, site: SiteEvaluation, target: np.ndarray, subcomponents: np.ndarray
) -> None:
    norms = np.linalg.norm(subcomponents, axis=(1, 2))
    largest = np.argsort(-norms, kind="stable")
    total = subcomponents.sum(axis=0)
    reach = 1.22 * max(float(np.abs(target).max()), float(np.abs(total).max()), 1e-12)
    error = float(np.linalg.norm(total - target)) / max(float(np.linalg.norm(target)), 1e-12)
    kind = "columns" if site.weight.shape[0] == 2 else "rows"
    part.suptitle(
        f"{plain(name)}: {kind} of the matrix in the target, in the sum, in the subcomponents by norm",
        fontweight="bold",
        fontsize=10.5,
    )
    grid = part.add_gridspec(SMALL_ROWS, SMALL_COLUMNS + 2 * SMALL_ROWS)
    side = SMALL_ROWS
    first = part.add_subplot(grid[:, :side])
    _draw_arrows(first, target, target, reach, labels=True)
    first.set_title("target")
    second = part.add_subplot(grid[:, side : 2 * side])
    _draw_arrows(second, total, target, reach, labels=True)
    second.set_title(f"sum of {len(norms)}, off by {error:.1%}")
    for place, index in enumerate(largest[: SMALL_ROWS * SMALL_COLUMNS]):
        small = part.add_subplot(grid[place // SMALL_COLUMNS, 2 * side + place % SMALL_COLUMNS])
        _draw_arrows(small, subcomponents[index], target, reach, labels=False)
        dead = "" if site.density[index] > 0 else ", dead"
        small.set_title(f"#{index}: {norms[index]:.2f}{dead}", fontsize=8.5, pad=2)


def _draw_arrows(
    axes: "Axes", vectors: np.ndarray, target: np.ndarray, reach: float, *, labels: bool
) -> None:
    around = np.argsort(np.arctan2(target[:, 1], target[:, 0]))
    outline = target[np.append(around, around[0])]
    axes.plot(outline[:, 0], outline[:, 1], color=FAINT, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
    axes.plot([0], [0], "o", color=FAINT, markersize=3.5, zorder=1.5)
    for index, (x, y) in enumerate(vectors):
        length = float(np.hypot(x, y))
        if length < 0.02 * reach:
            continue
        axes.plot([0, x], [0, y], color=colour_of(index), linewidth=2.0 if labels else 1.5, zorder=2)
        axes.plot([x], [y], "o", color=colour_of(index), markersize=5.0 if labels else 3.5, zorder=3)
        if labels:
            away = (length + 0.11 * reach) / length
            axes.text(x * away, y * away, str(index), ha="center", va="center", color=MUTED, fontsize=8.5)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[], aspect="equal")
    for spine in axes.spines.values():
        spine.set(visible=True, color=FAINT)
