"""Histogram of causal importances over the evaluation data, per site."""

from typing import TYPE_CHECKING

import numpy as np

from spd_hydra.counted import counted
from spd_hydra.figure.base import History, captioned, figure
from spd_hydra.figure.site_names import site_labels
from spd_hydra.figure.strips import MOST_PANELS, strips
from spd_hydra.figure.style import INK, MUTED, colour_of, new_figure, panels, plain
from spd_hydra.metric.evaluation import Evaluation, SiteEvaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PER_ROW = 3


@figure(
    "ci_histogram",
    "All causal importances of the evaluation data, counts on a logarithmic axis: a healthy run has its mass "
    "at 0 and at 1 and little between, while a broad middle means that it is still undecided what matters.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """Counts of g in equal bins over [0, 1] with the alive threshold, one panel or strip per site."""
    from matplotlib.ticker import NullLocator

    sites = {name: site for name, site in evaluation.sites.items() if site.histogram.sum() > 0}
    if not sites:
        return None
    if len(sites) > MOST_PANELS:
        return _draw_strips(evaluation, sites)
    across = min(len(sites), PER_ROW)
    down = -(-len(sites) // across)
    picture = new_figure(height=2.5 * down + 0.35)
    axes = panels(picture, down, across, used=len(sites), sharey=True)
    picture.suptitle(f"g over {counted(evaluation.n_positions, 'position')}", fontsize=10, color=MUTED)
    top = 30.0 * max(int(site.histogram.max()) for site in sites.values())  # room for the text
    names, labels = list(evaluation.sites), site_labels(sites, 34)
    for place, (name, site) in enumerate(sites.items()):
        panel, counts = axes[place], site.histogram
        edges = np.linspace(0, 1, len(counts) + 1)
        panel.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colour_of(names.index(name)))
        panel.axvline(evaluation.ci_threshold, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        panel.set(yscale="log", xlim=(-0.01, 1.01), ylim=(0.7, top), title=plain(labels[name]))
        panel.yaxis.set_minor_locator(NullLocator())
        panel.grid(visible=True, axis="y")
        text = f"threshold {evaluation.ci_threshold:g}\n{float(site.density.mean()):.3g} of all above"
        panel.text(0.97, 0.96, text, transform=panel.transAxes, ha="right", va="top", fontsize=8.5)
        if place % across == 0:
            panel.set_ylabel("count")
        if place + across >= len(sites):
            panel.set_xlabel("causal importance g")
    return picture


def _draw_strips(evaluation: Evaluation, sites: dict[str, SiteEvaluation]) -> "Figure":
    counts = np.stack([site.histogram for site in sites.values()]).astype(float)
    picture, axes = strips(list(sites), counts, "count")
    picture.suptitle(f"g over {counted(evaluation.n_positions, 'position')}", fontsize=10, color=MUTED)
    bins = counts.shape[1]
    places = np.linspace(0, 1, 6)
    axes.set_xticks(places * bins - 0.5, [f"{place:g}" for place in places])
    if evaluation.ci_threshold > 0:
        axes.axvline(evaluation.ci_threshold * bins - 0.5, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
    axes.set_xlabel("causal importance g")
    return captioned(
        picture,
        "All causal importances of the evaluation data, a row per site with the counts as its colour, which "
        "is logarithmic: a healthy run has its mass at 0 and at 1 and little between, while a broad middle "
        "means that it is still undecided what matters.",
    )
