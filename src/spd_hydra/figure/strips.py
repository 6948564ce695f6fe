"""Many sites in one picture: a row of colours for each, where panels of their own would be too many."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from spd_hydra.figure.site_names import site_labels
from spd_hydra.figure.style import FAINT, SEQUENTIAL, new_figure, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_PANELS = 12  # sites; beyond, they are strips


def strips(
    names: Sequence[str], values: Float[np.ndarray, "sites columns"], label: str
) -> "tuple[Figure, Axes]":
    """An image with a row per site on a logarithmic colour scale; what is not above 0 stays white.

    Args:
        names: of the sites.
        values: what is shown, a column per bin or rank; NaN, which is grey, where a site has no such column.
        label: of the colour bar.
    """
    from matplotlib.colors import ListedColormap, LogNorm

    beyond = np.isnan(values)
    shown: Any = np.ma.masked_where(beyond | (np.nan_to_num(values) <= 0), values)
    positive = values[values > 0]
    norm = LogNorm(float(positive.min()), float(positive.max())) if len(positive) else None
    picture = new_figure(height=0.2 * len(names) + 1.2)
    axes = picture.subplots()
    image = axes.imshow(shown, cmap=SEQUENTIAL, norm=norm, aspect="auto", interpolation="nearest")
    if beyond.any():
        grey: Any = np.ma.masked_where(~beyond, beyond)
        axes.imshow(grey, cmap=ListedColormap([FAINT]), aspect="auto", interpolation="nearest")
    axes.set_yticks(range(len(names)), [plain(label) for label in site_labels(names, 40).values()])
    axes.tick_params(axis="y", length=0)
    picture.colorbar(image, ax=axes, label=label, aspect=40, pad=0.015)
    return picture, axes
