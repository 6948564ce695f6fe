"""How many subcomponents each site has, uses at all, and uses at a position."""

from typing import TYPE_CHECKING

import numpy as np

from spd_hydra.counted import counted
from spd_hydra.figure.base import History, figure
from spd_hydra.figure.site_names import site_labels
from spd_hydra.figure.style import FAINT, MUTED, PALETTE, new_figure, panels, plain
from spd_hydra.metric.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@figure(
    "sites",
    "Every site's subcomponents, those that are alive, and those active per position (L0): a site that needs "
    "all it has asks for a larger C, and one with hardly any alive does little.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """A bar per site: alive of C on the left, L0 on the right."""
    sites = evaluation.sites
    if len(sites) < 2 or evaluation.checks:
        return None
    C = np.array([len(site.density) for site in sites.values()])
    alive = np.array([int((site.density > 0).sum()) for site in sites.values()])
    l0 = np.array([float(site.density.sum()) for site in sites.values()])
    rows = np.arange(len(sites))
    picture = new_figure(height=0.21 * len(sites) + 1.1)
    picture.suptitle(
        f"alive: g > {evaluation.ci_threshold:g} anywhere in {counted(evaluation.n_positions, 'position')}",
        fontsize=10,
        color=MUTED,
    )
    left, right = panels(picture, 1, 2, sharey=True)
    left.barh(rows, C, color=FAINT, height=0.72, label="C")
    left.barh(rows, alive, color=PALETTE[0], height=0.72, label="alive")
    left.set_title(f"alive: {alive.sum():,} of {C.sum():,}")
    right.barh(rows, l0, color=PALETTE[1], height=0.72)
    right.set_title(f"L0: {l0.sum():,.4g} per position")
    for panel, values, texts in ((left, C, [f"{n:,}" for n in alive]), (right, l0, [f"{x:.3g}" for x in l0])):
        for row, value, text in zip(rows, values, texts, strict=True):
            panel.annotate(
                text, (value, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        panel.set_xlim(0, 1.12 * max(float(values.max()), 1e-9))
        panel.set_xlabel("subcomponents")
        panel.grid(visible=True, axis="x")
    left.set_yticks(rows, [plain(label) for label in site_labels(sites, 40).values()])
    left.set_ylim(len(sites) - 0.4, -0.6)
    return picture
