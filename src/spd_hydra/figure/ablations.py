"""What ablated models lose: cross-entropy and divergence by kind of mask."""

from typing import TYPE_CHECKING

import numpy as np

from spd_hydra.counted import counted
from spd_hydra.figure.base import History, figure
from spd_hydra.figure.style import INK, MUTED, colour_of, new_figure, panels
from spd_hydra.metric.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {
    "ce": "cross-entropy, nats",
    "kl": "KL from the target",
    "mse": "MSE from the target",
}
TARGET = "target"


@figure(
    "ablations",
    "What is lost with masks at all sites: masks from causal importances and rounded ones should be as near "
    "to the target's dashed line as unmasked ones are, and far from random masks and from all off.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """A point per kind of mask, for cross-entropy and divergence, and for adversaries by their steps."""
    found = {group: _by_name(evaluation, group) for group in NAMES}
    found = {group: values for group, values in found.items() if values}
    if not found:
        return None
    divergence = "kl" if "kl" in found else "mse"
    for steps, value in _by_name(evaluation, "pgd").items():
        found.setdefault(divergence, {})[f"pgd {steps}"] = value
    rows = list(dict.fromkeys(name for values in found.values() for name in values if name != TARGET))
    picture = new_figure(height=0.27 * len(rows) + 1.2)
    picture.suptitle(counted(evaluation.n_positions, "position"), fontsize=10, color=MUTED)
    for index, (panel, (group, values)) in enumerate(
        zip(panels(picture, 1, len(found), sharey=True), found.items(), strict=True)
    ):
        _draw_points(panel, values, rows, colour_of(index))
        panel.set_xlabel(NAMES[group])
    return picture


def _by_name(evaluation: Evaluation, group: str) -> dict[str, float]:
    prefix = f"{group}/"
    return {
        name.removeprefix(prefix).replace("_", " "): value
        for name, value in evaluation.metrics.items()
        if name.startswith(prefix) and np.isfinite(value)
    }


def _draw_points(panel: "Axes", values: dict[str, float], rows: list[str], colour: str) -> None:
    """Values from left to right, from the target's own line; logarithmic where they are decades apart."""
    places = [rows.index(name) for name in values if name != TARGET]
    numbers = [value for name, value in values.items() if name != TARGET]
    base = values.get(TARGET)
    left = 0.0 if base is None else base
    positive = [number for number in numbers if number > 0]
    if base is None and positive and max(positive) > 100 * min(positive):
        panel.set_xscale("log")
        left = min(positive) / 2
    panel.hlines(places, left, numbers, color=colour, linewidth=1.2, alpha=0.5)
    panel.plot(numbers, places, "o", color=colour, markersize=6)
    for place, number in zip(places, numbers, strict=True):
        panel.annotate(
            f"{number:.4g}",
            (number, place),
            xytext=(7, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
        )
    if base is not None:
        panel.axvline(base, color=INK, linewidth=1.1, linestyle=(0, (4, 3)))
        panel.set_title(f"target {base:.4g}", fontsize=9.5, loc="left")
    panel.set_yticks(range(len(rows)), rows)
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.margins(x=0.18)
    if left == 0:  # a divergence has no values below
        panel.set_xlim(left=0)
    panel.grid(visible=True, axis="x")
