"""Sparsity against what is lost, over training."""

from typing import TYPE_CHECKING

import numpy as np

from spd_hydra.figure.base import History, figure
from spd_hydra.figure.curves import series
from spd_hydra.figure.style import INK, MUTED, new_figure, plain_decades
from spd_hydra.metric.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"ce": "cross-entropy with masks g, nats", "kl": "KL with masks g", "mse": "MSE with masks g"}


@figure(
    "trade_off",
    "Subcomponents active per position against what is lost when all others are off, a point per evaluation, "
    "the last one ringed: training should move to the left without moving up.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """L0 over all sites, and cross-entropy or divergence with causal importances as masks, by step."""
    from matplotlib.ticker import FuncFormatter, ScalarFormatter

    l0 = series(history, "eval", "l0").get("total")
    losses = {group: found["ci"] for group in NAMES if "ci" in (found := series(history, "eval", group))}
    if l0 is None or not losses:
        return None
    group = next(iter(losses))
    steps, at_l0, at_loss = np.intersect1d(l0[0], losses[group][0], return_indices=True)
    x, y = l0[1][at_l0], losses[group][1][at_loss]
    if len(steps) < 2:  # there is no course yet
        return None
    picture = new_figure(height=4.0, width=7.0)
    axes = picture.subplots()
    axes.plot(x, y, color=MUTED, linewidth=0.8, zorder=1)
    points = axes.scatter(x, y, c=steps, cmap="viridis", s=34, zorder=2)
    axes.plot(x[-1], y[-1], "o", markersize=12, markerfacecolor="none", markeredgecolor=INK, zorder=3)
    target = evaluation.metrics.get("ce/target") if group == "ce" else None
    if target is not None:
        axes.axhline(target, color=INK, linewidth=1.1, linestyle=(0, (4, 3)), label=f"target {target:.4g}")
        axes.legend(loc="best")
    elif (y > 0).all() and y.max() > 30 * y.min():
        plain_decades(axes)
    if x.min() > 0 and x.max() > 30 * x.min():
        axes.set_xscale("log")
    axes.set(
        xlabel=f"L0: active per position, all sites (g > {evaluation.ci_threshold:g})", ylabel=NAMES[group]
    )
    for axis in (axes.xaxis, axes.yaxis):
        if isinstance(ticks := axis.get_major_formatter(), ScalarFormatter):
            ticks.set_useOffset(False)  # or each tick would have to be added to a number
    axes.grid(visible=True)
    bar = picture.colorbar(points, ax=axes, label="step", aspect=30, pad=0.02)
    bar.ax.yaxis.set_major_formatter(
        FuncFormatter(lambda v, _: f"{v / 1000:g}k" if abs(v) >= 1000 else f"{v:g}")
    )
    return picture
