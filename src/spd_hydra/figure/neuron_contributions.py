"""How much every neuron contributes to every feature, target against decomposition, for residual MLPs."""

from typing import TYPE_CHECKING

import numpy as np

from spd_hydra.figure.base import History, figure
from spd_hydra.figure.style import INK, WIDTH, colour_of, new_figure, panels, plain
from spd_hydra.metric.contributions import agreement
from spd_hydra.metric.evaluation import Evaluation, NeuronContributions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PER_ROW = 3


@figure(
    "neuron_contributions",
    "Contribution of each neuron to each feature's own output, target against the strongest subcomponent: "
    "points on the dashed line mean that subcomponents carry what the target computes, a slope below 1 means "
    "that they shrink it.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """Paper, Figures 7, 10 and 11: one scatter per layer with y = x, R² and slope."""
    layers = evaluation.contributions
    if not layers:
        return None
    across = min(len(layers), PER_ROW)
    down = -(-len(layers) // PER_ROW)
    side = 4.6 if across == 1 else WIDTH / across
    picture = new_figure(height=(side + 0.35) * down, width=max(side * across, 5.0))
    axes = panels(picture, down, across, used=len(layers))
    for index, layer in enumerate(layers):
        _draw_layer(axes[index], layer, colour_of(index))
    return picture


def _draw_layer(axes: "Axes", layer: NeuronContributions, colour: str) -> None:
    r_squared, slope = agreement(layer)
    both = np.concatenate([layer.target.ravel(), layer.subcomponents.ravel()])
    margin = 0.04 * (float(np.ptp(both)) or 1.0)
    limits = (float(both.min()) - margin, float(both.max()) + margin)
    axes.plot(limits, limits, color=INK, linewidth=1.0, linestyle=(0, (4, 3)), zorder=1, label="y = x")
    axes.plot(
        layer.target.ravel(), layer.subcomponents.ravel(), "o", color=colour, markersize=3, alpha=0.35,
        markeredgewidth=0, zorder=2,
    )  # fmt: skip
    n_features, n_neurons = layer.target.shape
    axes.set(xlim=limits, ylim=limits, aspect="equal", xlabel="target", ylabel="largest over subcomponents")
    axes.set_title(f"{plain(layer.layer)}\n{n_features} features × {n_neurons} neurons")
    axes.grid(visible=True)
    axes.text(
        0.04, 0.96, f"R² to y = x  {r_squared:.4f}\nslope  {slope:.3f}", transform=axes.transAxes, va="top"
    )
