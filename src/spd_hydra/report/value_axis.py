"""An axis on which stand the values that a sweep gave a key."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spd_hydra.figure.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOGARITHMIC_FROM = 4.0  # the largest value over the smallest
MOST_TICKS = 7  # beyond, round numbers are ticks
CHARACTER, LINE = 0.075, 0.19  # inches, of a tick's text: along it, and between slanting ones
SLANTING: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether these sorted values are so far apart that their axis is logarithmic."""
    return bool(values) and values[0] > 0 and values[-1] >= LOGARITHMIC_FROM * values[0]


def label_values(axes: "Axes", values: Sequence[float], label: str, width: float) -> None:
    """Name the axis; the sorted values themselves are its ticks while they are few.

    Args:
        axes: whose x axis it is.
        values: sorted.
        label: of the axis.
        width: of the axis in inches, roughly.
    """
    from matplotlib.ticker import NullLocator

    if is_logarithmic(values):
        axes.set_xscale("log")
    if len(values) <= MOST_TICKS:
        texts, slanting = tick_texts(values, width)
        axes.set_xticks(list(values), texts, **(SLANTING if slanting else {}))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(plain(label))
    axes.grid(visible=True)


def tick_texts(values: Sequence[float], width: float) -> tuple[list[str], bool]:
    """Texts of the sorted values, and whether they have to slant to stand beside each other.

    What does not even then have room beside the text before it is empty.
    """
    texts = [f"{value:g}" for value in values]
    places = [math.log(value) for value in values] if is_logarithmic(values) else list(values)
    whole = (places[-1] - places[0]) or 1.0 if places else 1.0
    gaps = [width * (right - left) / whole for left, right in itertools.pairwise(places)]
    room = [CHARACTER * ((len(left) + len(right)) / 2 + 1) for left, right in itertools.pairwise(texts)]
    if all(gap >= needed for gap, needed in zip(gaps, room, strict=True)):
        return texts, False
    since = 0.0  # inches from the last text that is shown
    for place, gap in enumerate(gaps, start=1):
        since += gap
        if since < LINE:
            texts[place] = ""
        else:
            since = 0.0
    return texts, True
