"""Causal importances on single-feature inputs as heatmaps, beside the distance from the known answer."""

from typing import TYPE_CHECKING, Any

import numpy as np

from spd_hydra.figure.base import History, figure
from spd_hydra.figure.columns import Columns, checks_of, columns_of, expected_of, label_columns, wrong_entries
from spd_hydra.figure.style import BAR_WIDTH, MUTED, SEQUENTIAL, WIDTH, WRONG, new_figure, panels, plain
from spd_hydra.metric.evaluation import Evaluation, SiteCheck, SiteEvaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANEL_WIDTH = (WIDTH - 1.6) / 2
MOST_SITES = 12
MOST_MARKS = 400
LEAST_SEEN = 1 / 256  # of the colour range: one step of it


@figure(
    "causal_importance",
    "Causal importance of each subcomponent when one feature is active, columns permuted to the known "
    "answer: a solved identity site is a clean diagonal, a solved dense site is filled left of the dashed "
    "line and empty right of it, orange frames mark what the strictest check counts as errors, and the "
    "upper-leaky g are beside them where they look different.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """Heatmaps per site of the lower-leaky g (the masks), and of the upper-leaky (the importance loss)."""
    probed = [name for name, site in evaluation.sites.items() if site.probe_lower is not None][:MOST_SITES]
    if not probed:
        return None
    columns = {name: columns_of(evaluation.sites[name], expected_of(evaluation, name)) for name in probed}
    drawn = {name: _heatmaps(evaluation.sites[name], columns[name]) for name in probed}
    beside = 2 if all(len(own) == 1 for own in drawn.values()) else 1  # sites in a row
    across = min(beside, len(probed))
    heights = [
        max(_panel_height(*drawn[name][0][1].shape) for name in row) + 1.2
        for row in (probed[at : at + across] for at in range(0, len(probed), across))
    ]
    picture = new_figure(height=sum(heights) + 0.3, width=WIDTH * across / beside)
    picture.suptitle("one feature active at a time, input magnitude 0.75", fontsize=10, color=MUTED)
    parts = np.ravel(np.asarray(picture.subfigures(len(heights), across, height_ratios=heights)))
    between = "\n" if beside > 1 else ", "  # half a row has no room for both
    for part, name in zip(parts, probed, strict=False):
        found = checks_of(evaluation, name)
        title = f"{plain(name)}: {_distance(found, between)}"
        _draw_site(part, title, drawn[name], found, columns[name], places=2 // beside)
    return picture


def _heatmaps(site: SiteEvaluation, columns: Columns) -> list[tuple[str, np.ndarray]]:
    """Title and values of each panel: the upper-leaky g only where its picture would be another."""
    assert site.probe_lower is not None, "only sites with a probe are drawn"
    lower = site.probe_lower[:, columns.shown]
    found = [("lower-leaky g (masks)", lower)]
    if site.probe_upper is not None:
        upper = site.probe_upper[:, columns.shown]
        if not _look_alike(lower, upper):
            found.append(("upper-leaky g (importance loss)", upper))
    return found


def _panel_height(n_features: int, n_columns: int) -> float:
    cell = min(PANEL_WIDTH / max(n_columns, 1), 0.4)
    return float(np.clip(cell * n_features, 0.9, PANEL_WIDTH))


def _draw_site(
    part: Any,
    title: str,
    drawn: list[tuple[str, np.ndarray]],
    found: list[SiteCheck],
    columns: Columns,
    *,
    places: int,
) -> None:
    axes = panels(part, 1, places, used=len(drawn))
    part.suptitle(title, fontweight="bold", fontsize=10.5)
    image = None
    for place, (kind, values) in enumerate(drawn):
        panel = axes[place]
        image = panel.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        panel.set_title(kind)
        _label(panel, columns, first=place == 0)
        if found and found[0].expected < len(columns.shown):
            panel.axvline(found[0].expected - 0.5, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)))
    if found:
        _mark(axes[0], wrong_entries(found[0], drawn[0][1]))
    bar_aspect = _panel_height(*drawn[0][1].shape) / BAR_WIDTH
    assert image is not None, "a probed site has at least its lower-leaky importances"
    part.colorbar(image, ax=axes[: len(drawn)], shrink=0.9, aspect=bar_aspect, pad=0.015, ticks=[0, 0.5, 1])


def _look_alike(first: np.ndarray, second: np.ndarray) -> bool:
    """Whether two heatmaps have the same colours, which do not tell apart what is beyond 0 and 1."""
    return bool(np.abs(first.clip(0, 1) - second.clip(0, 1)).max(initial=0.0) < LEAST_SEEN)


def _distance(found: list[SiteCheck], between: str) -> str:
    """The checks of a site in words, e.g. `identity of 5, errors 0 at tolerance 0.1, 0 at tolerance 0.2`."""
    if not found:
        return "no known answer"
    errors = ", ".join(f"{check.error} at tolerance {check.tolerance:g}" for check in found)
    return f"{found[0].name} of {found[0].expected}{between}errors {errors}"


def _label(panel: "Axes", columns: Columns, *, first: bool) -> None:
    label_columns(panel, columns)
    if first:
        panel.set_ylabel("active feature")
        if columns.note:
            panel.set_xlabel(f"{panel.get_xlabel()}\n({columns.note})")


def _mark(panel: "Axes", wrong: np.ndarray) -> None:
    """Frame the wrong entries; beyond some hundreds, which the title then says, frames would hide them."""
    from matplotlib.patches import Rectangle

    marked = np.argwhere(wrong)
    if len(marked) > MOST_MARKS:
        panel.set_title(f"{panel.get_title()}, {len(marked):,} errors, too many to frame")
        return
    for row, column in marked:
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=WRONG, linewidth=1.4)
        panel.add_patch(frame)
