"""The V and U matrices of every site as images, columns in the order of the causal-importance heatmaps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float

from spd_hydra.figure.base import History, captioned, figure
from spd_hydra.figure.columns import Columns, columns_of, expected_of, label_columns
from spd_hydra.figure.style import BAR_WIDTH, DIVERGING, MUTED, WIDTH, new_figure, panels, plain
from spd_hydra.metric.evaluation import Evaluation, SiteEvaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_SITES = 12
MOST_UNKNOWN = 4  # without a known answer: the matrices of a large model are noise to the eye
MOST_ROWS = 1024
PALE = 0.25  # how much of its colour a dead subcomponent has
PANEL_WIDTH = (WIDTH - 2.0) / 2


@figure(
    "weights",
    "Read-in directions V and write-out directions U, one column per subcomponent, the two vectors of a pair "
    "scaled to equal length and dead subcomponents pale.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """V (in the basis of the features where it is known) and U, red positive, blue negative."""
    names = list(evaluation.sites)[:MOST_SITES]
    if not names or (not evaluation.checks and len(evaluation.sites) > MOST_UNKNOWN):
        return None
    matrices = {name: _matrices(evaluation, name) for name in names}
    heights = [max(_height(m.shape) for m in (read, write)) + 1.1 for read, write, _ in matrices.values()]
    picture = new_figure(height=sum(heights))
    parts = np.atleast_1d(np.asarray(picture.subfigures(len(names), 1, height_ratios=heights)))
    for part, name in zip(parts, names, strict=True):
        _draw_site(part, name, evaluation.sites[name], *matrices[name])
    left_out = len(evaluation.sites) - len(names)
    if left_out:
        picture.suptitle(f"the first {len(names)} of {len(evaluation.sites)} sites", color=MUTED, fontsize=10)
    return captioned(picture, _caption(evaluation, names))


def _caption(evaluation: Evaluation, names: Sequence[str]) -> str:
    shown = [evaluation.sites[name] for name in names]
    has_heatmaps = any(site.probe_lower is not None for site in shown)
    place = "in the order of the heatmaps above" if has_heatmaps else "the heaviest first"
    is_identity = any(check.name == "identity" and check.site in names for check in evaluation.checks)
    features = is_identity and any(site.directions is not None for site in shown)
    answers = "in a solved identity site each column of V or U is one feature, and " if features else ""
    return (
        f"Read-in directions V and write-out directions U, one column per subcomponent, {place}, the two "
        f"vectors of a pair scaled to equal length: {answers}dead subcomponents are pale."
    )


def balanced(
    site: SiteEvaluation,
) -> tuple[Float[np.ndarray, "d_in C"], Float[np.ndarray, "C d_out"]]:
    """V and U with the two vectors of every subcomponent scaled to equal norms; their product is unchanged.

    Only the product means something: an unscaled V may look large where U is close to nothing.
    """
    v_norms, u_norms = np.linalg.norm(site.V, axis=0), np.linalg.norm(site.U, axis=1)
    both = (v_norms > 0) & (u_norms > 0)
    scale = np.sqrt(np.divide(u_norms, v_norms, out=np.zeros_like(v_norms), where=both))
    inverse = np.divide(1.0, scale, out=np.zeros_like(scale), where=both)
    return site.V * scale, site.U * inverse[:, None]


def _matrices(evaluation: Evaluation, name: str) -> tuple[np.ndarray, np.ndarray, Columns]:
    site = evaluation.sites[name]
    columns = columns_of(site, expected_of(evaluation, name))
    V, U = balanced(site)
    read = (V if site.directions is None else site.directions @ V)[:, columns.shown]
    return read, U.T[:, columns.shown], columns


def _height(shape: tuple[int, ...]) -> float:
    rows, n_columns = shape
    cell = min(PANEL_WIDTH / max(n_columns, 1), 0.4)
    return float(np.clip(cell * rows, 0.9, PANEL_WIDTH))


def _draw_site(
    part: Any, name: str, site: SiteEvaluation, read: np.ndarray, write: np.ndarray, columns: Columns
) -> None:
    part.suptitle(
        plain(name) + (f" ({columns.note})" if columns.note else ""), fontweight="bold", fontsize=10.5
    )
    left, right = panels(part, 1, 2)
    rows = "input dimension" if site.directions is None else "feature"
    title = "V, read in" if site.directions is None else "V, read in, in the basis of the features"
    dead = site.density[columns.shown] <= 0
    _draw_matrix(part, left, read, columns, dead, title, rows)
    _draw_matrix(part, right, write, columns, dead, "U, write out (transposed)", "output dimension")


def _draw_matrix(
    part: Any,
    axes: "Axes",
    matrix: np.ndarray,
    columns: Columns,
    dead: Bool[np.ndarray, " shown"],
    title: str,
    rows: str,
) -> None:
    shape = matrix.shape
    if len(matrix) > MOST_ROWS:
        heaviest = np.sort(np.argsort(-np.linalg.norm(matrix, axis=1), kind="stable")[:MOST_ROWS])
        rows, matrix = f"{rows} ({MOST_ROWS:,} heaviest of {len(matrix):,})", matrix[heaviest]
    limit = float(np.abs(matrix).max()) or 1.0
    alpha = np.broadcast_to(np.where(dead, PALE, 1.0), matrix.shape)
    image = axes.imshow(matrix, cmap=DIVERGING, vmin=-limit, vmax=limit, aspect="auto", alpha=alpha)
    axes.set(title=title, ylabel=rows)
    label_columns(axes, columns)
    aspect = _height(shape) / BAR_WIDTH
    bar = part.colorbar(image, ax=axes, shrink=0.9, aspect=aspect, pad=0.015, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels([f"−{limit:.2g}", "0", f"{limit:.2g}"])
