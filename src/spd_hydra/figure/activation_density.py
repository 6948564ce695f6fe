"""How often each subcomponent is active: a histogram of densities per site."""

from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from spd_hydra.counted import counted
from spd_hydra.figure.base import History, captioned, figure
from spd_hydra.figure.site_names import site_labels
from spd_hydra.figure.strips import MOST_PANELS, strips
from spd_hydra.figure.style import (
    FAINT,
    MUTED,
    colour_of,
    new_figure,
    panels,
    plain,
    plain_decades,
)
from spd_hydra.metric.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_ROW = 3
BINS_PER_DECADE = 8


@figure(
    "activation_density",
    "Share of positions at which each subcomponent is active, both axes logarithmic: those near 1 are active "
    "on almost every input.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """Number of subcomponents per density, from one position to all of them; dead ones apart at the left."""
    sites = evaluation.sites
    if not sites:
        return None
    if len(sites) > MOST_PANELS:
        return _draw_strips(evaluation)
    across = min(len(sites), PER_ROW)
    down = -(-len(sites) // across)
    picture = new_figure(height=2.5 * down + 0.35)
    axes = panels(picture, down, across, used=len(sites), sharey=True)
    condition = f"active: g > {evaluation.ci_threshold:g}, {counted(evaluation.n_positions, 'position')}"
    picture.suptitle(condition, fontsize=10, color=MUTED)
    top = 4.0 * max(len(site.density) for site in sites.values())  # room for the text
    labels = site_labels(sites, 34)
    for place, (name, site) in enumerate(sites.items()):
        panel = axes[place]
        _draw_densities(panel, site.density, evaluation.n_positions, colour_of(place))
        panel.set_title(plain(labels[name]))
        panel.set_ylim(0.7, top)
        plain_decades(panel)
        if place % across == 0:
            panel.set_ylabel("subcomponents")
        if place + across >= len(sites):
            panel.set_xlabel("share of positions")
    return captioned(picture, _caption(evaluation))


def _caption(evaluation: Evaluation) -> str:
    has_dead = any((site.density <= 0).any() for site in evaluation.sites.values())
    dead = "the grey bar counts the dead ones, " if has_dead else ""
    if evaluation.checks:
        others = "the others should sit at the frequency of the features"
    else:
        others = "the further left the others, the rarer the inputs that need them"
    return (
        "Share of positions at which each subcomponent is active, both axes logarithmic: "
        f"{dead}{others if has_dead else others.replace('the others', 'they')}, and those near 1 are active "
        "on almost every input."
    )


def _draw_strips(evaluation: Evaluation) -> "Figure":
    sites = evaluation.sites
    found = [binned(site.density, evaluation.n_positions) for site in sites.values()]
    _, edges, _ = found[0]
    rows = np.stack([np.concatenate([[dead, 0, 0], counts]) for dead, _, counts in found]).astype(float)
    picture, axes = strips(list(sites), rows, "subcomponents")
    picture.suptitle(
        f"active: g > {evaluation.ci_threshold:g}, {counted(evaluation.n_positions, 'position')}",
        fontsize=10,
        color=MUTED,
    )
    decades = range(0, len(edges), BINS_PER_DECADE)
    axes.set_xticks([0, *[2.5 + place for place in decades]], ["dead", *[f"{edges[p]:.3g}" for p in decades]])
    axes.set_xlabel("share of positions")
    return captioned(
        picture,
        "Share of positions at which each subcomponent is active, on a logarithmic axis, a row per site with "
        "the number of subcomponents as its colour: the dead ones are counted at the left, the further left "
        "the others, the rarer the inputs that need them, and those near 1 are active on almost every input.",
    )


def binned(
    density: Float[np.ndarray, " C"], n_positions: int
) -> tuple[int, Float[np.ndarray, " edges"], Int[np.ndarray, " bins"]]:
    """How many are dead, and edges and counts of logarithmic bins of the others' densities."""
    decades = max(int(np.ceil(np.log10(max(n_positions, 10)))), 1)
    edges = np.logspace(-decades, 0, decades * BINS_PER_DECADE + 1)
    edges[-1] = 1.0 + 1e-9
    above = density[density > 0]
    counts, _ = np.histogram(np.maximum(above, edges[0]), bins=edges)
    return int(len(density) - len(above)), edges, counts


def _draw_densities(panel: "Axes", density: np.ndarray, n_positions: int, colour: str) -> None:
    dead, edges, counts = binned(density, n_positions)
    panel.set(xscale="log", yscale="log")
    panel.bar(
        edges[:-1], counts, width=np.diff(edges), align="edge", color=colour, edgecolor="white", linewidth=0.4
    )
    apart = edges[0] / 10
    panel.bar(apart / 2.2, dead, width=apart * (2.2 - 1 / 2.2), align="edge", color=FAINT)
    ticks = [t for t in 10.0 ** np.arange(np.log10(edges[0]), 0.5) if t <= 1]
    every = -(-len(ticks) // 4)
    shown = ticks[::-1][::every][::-1]
    panel.set_xticks([apart * 0.75, *shown], ["dead", *[f"{tick:g}" for tick in shown]])
    panel.set_xticks([], minor=True)
    panel.set_xlim(apart / 4, 2.0)
    panel.grid(visible=True, axis="y")
    alive = len(density) - dead
    panel.text(
        0.97,
        0.96,
        f"{alive} alive, {dead} dead",
        transform=panel.transAxes,
        ha="right",
        va="top",
        fontsize=8.5,
    )
