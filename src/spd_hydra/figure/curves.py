"""Series of numbers out of the metrics log, for the figures over training steps."""

from typing import TYPE_CHECKING

import numpy as np

from spd_hydra.figure.base import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 1500

Series = tuple[np.ndarray, np.ndarray]  # steps and values


def series(history: History, split: str, group: str) -> dict[str, Series]:
    """Steps and values of every `<group>/<name>` logged for a split, by name, in the order of first sight.

    A step that was logged twice, as after a resume, counts with its last value. Values that are no finite
    numbers are left out.
    """
    found: dict[str, dict[int, float]] = {}
    for row in history:
        if row.get("split") != split or "step" not in row:
            continue
        for key, value in row.items():
            if key.startswith(f"{group}/") and isinstance(value, int | float) and np.isfinite(value):
                found.setdefault(key.removeprefix(f"{group}/"), {})[int(row["step"])] = float(value)
    ordered = {name: sorted(points.items()) for name, points in found.items()}
    return {name: (np.array([s for s, _ in p]), np.array([v for _, v in p])) for name, p in ordered.items()}


def thinned(points: Series) -> Series:
    """At most a screenful of points, evenly chosen, the last one always among them."""
    steps, values = points
    if len(steps) <= MOST_POINTS:
        return points
    chosen = np.unique(np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int))
    return steps[chosen], values[chosen]


def label_steps(axes: "Axes") -> None:
    """Steps on the x axis as 5k instead of 5000, and a light grid."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
    axes.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 1000 else f"{x:g}")
    )
    axes.set_xlabel("step")
    axes.grid(visible=True)
