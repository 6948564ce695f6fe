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


@figure(
    "causal_importance",
    "Causal importance of each subcomponent when one feature is active, columns permuted to the known "
    "answer: a solved identity site is a clean diagonal, a solved dense site is filled left of the dashed "
    "line and empty right of it, and orange frames mark what the strictest check counts as errors.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """Heatmaps per site, lower-leaky (the masks) and upper-leaky (the importance loss) side by side."""
    probed = [name for name, site in evaluation.sites.items() if site.probe_lower is not None][:MOST_SITES]
    if not probed:
        return None
    columns = {name: columns_of(evaluation.sites[name], expected_of(evaluation, name)) for name in probed}
    heights = [_panel_height(evaluation.sites[name], len(columns[name].shown)) + 1.05 for name in probed]
    picture = new_figure(height=sum(heights) + 0.3)
    picture.suptitle("one feature active at a time, input magnitude 0.75", fontsize=10, color=MUTED)
    parts = np.atleast_1d(np.asarray(picture.subfigures(len(probed), 1, height_ratios=heights)))
    for part, name in zip(parts, probed, strict=True):
        found = checks_of(evaluation, name)
        _draw_site(part, name, evaluation.sites[name], found, columns[name])
    return picture


def _panel_height(site: SiteEvaluation, n_columns: int) -> float:
    assert site.probe_lower is not None, "only sites with a probe are drawn"
    cell = min(PANEL_WIDTH / max(n_columns, 1), 0.4)
    return float(np.clip(cell * len(site.probe_lower), 0.9, PANEL_WIDTH))


def _draw_site(part: Any, name: str, site: SiteEvaluation, found: list[SiteCheck], columns: Columns) -> None:
    both = [
        ("lower-leaky g (masks)", site.probe_lower),
        ("upper-leaky g (importance loss)", site.probe_upper),
    ]
    drawn = [(title, values[:, columns.shown]) for title, values in both if values is not None]
    axes = panels(part, 1, 2, used=len(drawn))
    part.suptitle(f"{plain(name)}: {_distance(found)}", fontweight="bold", fontsize=10.5)
    image = None
    for place, (title, values) in enumerate(drawn):
        panel = axes[place]
        image = panel.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        panel.set_title(title)
        _label(panel, columns, first=place == 0)
        if found and found[0].expected < len(columns.shown):
            panel.axvline(found[0].expected - 0.5, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)))
    if found:
        _mark(axes[0], wrong_entries(found[0], drawn[0][1]))
    bar_aspect = _panel_height(site, len(columns.shown)) / BAR_WIDTH
    assert image is not None, "a probed site has at least its lower-leaky importances"
    part.colorbar(image, ax=axes[: len(drawn)], shrink=0.9, aspect=bar_aspect, pad=0.015, ticks=[0, 0.5, 1])


def _distance(found: list[SiteCheck]) -> str:
    """The checks of a site in words, e.g. `identity of 5, errors 0 at tolerance 0.1, 0 at tolerance 0.2`."""
    if not found:
        return "no known answer"
    errors = ", ".join(f"{check.error} at tolerance {check.tolerance:g}" for check in found)
    return f"{found[0].name} of {found[0].expected}, errors {errors}"


def _label(panel: "Axes", columns: Columns, *, first: bool) -> None:
    label_columns(panel, columns)
    if first:
        panel.set_ylabel("active feature")
        if columns.note:
            panel.set_xlabel(f"{panel.get_xlabel()}\n({columns.note})")


def _mark(panel: "Axes", wrong: np.ndarray) -> None:
    """Frame the wrong entries; beyond some hundreds the frames would hide what they mark."""
    from matplotlib.patches import Rectangle

    marked = np.argwhere(wrong)
    if len(marked) > MOST_MARKS:
        return
    for row, column in marked:
        frame = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=WRONG, linewidth=1.4)
        panel.add_patch(frame)
