"""Mean causal importance per subcomponent, largest first, on a linear and a logarithmic axis."""

from typing import TYPE_CHECKING

import numpy as np

from spd_hydra.counted import counted
from spd_hydra.figure.base import History, captioned, figure
from spd_hydra.figure.columns import expected_of
from spd_hydra.figure.site_names import site_labels
from spd_hydra.figure.strips import MOST_PANELS, strips
from spd_hydra.figure.style import MUTED, colour_of, new_figure, panels, plain, plain_decades
from spd_hydra.metric.evaluation import Evaluation, SiteEvaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW_DECADES = 300  # the top of a logarithmic axis over its bottom
WIDE_UP_TO = 3  # sites; beyond, two sites share a row


@figure(
    "mean_ci",
    "Mean causal importance of every subcomponent, sorted: behind a cliff the rest is dead, and a long slope "
    "means that several subcomponents still share the work of one.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """Per site the sorted means, filled where alive (g above the threshold anywhere), and the alive count."""
    sites = evaluation.sites
    if not sites:
        return None
    if len(sites) > MOST_PANELS:
        return _draw_strips(evaluation)
    pairs = 1 if len(sites) <= WIDE_UP_TO else 2
    down = -(-len(sites) // pairs)
    picture = new_figure(height=(2.3 if pairs == 1 else 2.5) * down + 0.4)
    axes = panels(picture, down, 2 * pairs, used=2 * len(sites))
    alive = (
        f"alive: g > {evaluation.ci_threshold:g} anywhere in {counted(evaluation.n_positions, 'position')}"
    )
    sure = evaluation.ci_threshold > 0 and any((site.mean_ci > 0).any() for site in sites.values())
    below = ", below dotted = surely dead" if sure else ""
    picture.suptitle(f"filled = {alive}{below}", fontsize=10, color=MUTED)
    labels = site_labels(sites, 30)
    for place, (name, site) in enumerate(sites.items()):
        expected = expected_of(evaluation, name)
        linear, logarithmic = axes[2 * place], axes[2 * place + 1]
        last_row = place + pairs >= len(sites)
        for panel in (linear, logarithmic):
            _draw_sorted(panel, site, colour_of(place), expected)
            panel.set_xlabel("rank" if last_row else "")
        linear.set_ylim(bottom=-0.04 * linear.get_ylim()[1])
        between = ": " if pairs == 1 else "\n"
        linear.set_title(f"{plain(labels[name])}{between}{_count(site, expected)}")
        linear.set_ylabel("mean g")
        _make_logarithmic(logarithmic, site, evaluation)
    return captioned(picture, _caption(is_known=bool(evaluation.checks), has_line=sure))


def _caption(*, is_known: bool, has_line: bool) -> str:
    cliff = "a cliff after the expected number" if is_known else "a cliff"
    slope = "a long slope means that several subcomponents still share the work of one"
    line = (
        f"{slope}, and below the dotted line, the threshold of g over the number of positions, a mean is too "
        "small for even one position to be active"
    )
    return (
        f"Mean causal importance of every subcomponent, sorted: {cliff} means that the rest is dead, "
        f"{line if has_line else f'and {slope}'}."
    )


def _draw_strips(evaluation: Evaluation) -> "Figure":
    sites = evaluation.sites
    most = max(len(site.mean_ci) for site in sites.values())
    means = np.full((len(sites), most), np.nan)
    for row, site in enumerate(sites.values()):
        means[row, : len(site.mean_ci)] = np.sort(site.mean_ci)[::-1]
    surely_dead = max(evaluation.ci_threshold, 1e-3) / max(evaluation.n_positions, 1)
    beyond = np.isnan(means)
    shown = np.where(beyond | (means > surely_dead), means, 0.0)
    picture, axes = strips(list(sites), shown, "mean g")
    grey = ", grey: beyond the site's C" if beyond.any() else ""
    picture.suptitle(
        f"mean g over {counted(evaluation.n_positions, 'position')}, white below {surely_dead:.1g}{grey}",
        fontsize=10,
        color=MUTED,
    )
    axes.set_xlabel("rank")
    return captioned(
        picture,
        "Mean causal importance of every subcomponent, sorted, a row per site and its colour logarithmic: a "
        "row that turns white early needs few of its subcomponents, one that fades slowly still shares the "
        "work of one among several, and white means are too small for even one position to be active.",
    )


def _count(site: SiteEvaluation, expected: int | None) -> str:
    alive = int((site.density > 0).sum())
    return f"{alive} of {len(site.density)} alive" + ("" if expected is None else f", {expected} expected")


def _draw_sorted(panel: "Axes", site: SiteEvaluation, colour: str, expected: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    order = np.argsort(-site.mean_ci, kind="stable")
    rank, values, alive = np.arange(1, len(order) + 1), site.mean_ci[order], site.density[order] > 0
    size = 4.5 if len(order) <= 100 else 2.5
    panel.plot(rank[alive], values[alive], "o", color=colour, markersize=size)
    panel.plot(
        rank[~alive], values[~alive], "o", markerfacecolor="white", markeredgecolor=MUTED, markersize=size,
        markeredgewidth=0.8, zorder=1.5,
    )  # fmt: skip
    if expected is not None:
        panel.axvline(expected + 0.5, color=MUTED, linewidth=0.9, linestyle=(0, (4, 2)))
    panel.set_xlim(0, len(order) + 1)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    panel.grid(visible=True, axis="y")


def _make_logarithmic(panel: "Axes", site: SiteEvaluation, evaluation: Evaluation) -> None:
    """Below threshold / positions a mean cannot hide a single alive position: that line is drawn."""
    from matplotlib.ticker import NullLocator

    zero = int((site.mean_ci <= 0).sum())
    positive = site.mean_ci[site.mean_ci > 0]
    panel.set_title("log scale" + (f", {zero} exactly 0" if zero else ""), color=MUTED)
    if not len(positive):
        return
    panel.set_yscale("log")
    panel.yaxis.set_minor_locator(NullLocator())
    surely_dead = evaluation.ci_threshold / max(evaluation.n_positions, 1)
    bottom = max(min(float(positive.min()), surely_dead or np.inf) / 3, 1e-12)
    top = max(2 * float(positive.max()), 10 * bottom)
    panel.set_ylim(bottom, top)
    if top < FEW_DECADES * bottom:  # powers of ten alone would be one label or two
        plain_decades(panel)
    if surely_dead > 0:
        panel.axhline(surely_dead, color=MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
