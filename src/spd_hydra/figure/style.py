"""One look for all figures: sizes, colours that colour-blind readers can tell apart, small helpers."""

import contextlib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 10.0  # inches: at the report's width of 960 px one point of font size is 1.33 px
DPI = 160
BAR_WIDTH = 0.13  # inches, of colour bars

# Okabe and Ito's palette without its yellow, which vanishes on white.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C510A"]
INK = "#222222"
MUTED = "#6B6B6B"
FAINT = "#C8C8C8"
WRONG = "#D55E00"
SEQUENTIAL = "Blues"
DIVERGING = "RdBu_r"

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": False,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "figure.constrained_layout.h_pad": 0.05,
    "figure.constrained_layout.w_pad": 0.05,
}


@contextlib.contextmanager
def drawing_style() -> Iterator[None]:
    """Matplotlib's own defaults with the project's look, whatever the user's matplotlibrc says."""
    import matplotlib

    _load_fonts()
    # Choosing a backend is global and would load pyplot: the two keys stay as they are.
    defaults: dict[str, Any] = {
        k: v for k, v in matplotlib.rcParamsDefault.items() if not k.startswith("backend")
    }
    with matplotlib.rc_context(cast("Any", defaults | STYLE)):
        yield


def _load_fonts() -> None:
    """On a machine's first picture matplotlib tells that it has listed the fonts, which is of no interest."""
    told = logging.getLogger("matplotlib.font_manager")
    before = told.level
    told.setLevel(logging.WARNING)
    try:
        import matplotlib.font_manager  # noqa: F401
    finally:
        told.setLevel(before)


def new_figure(height: float, width: float = WIDTH) -> "Figure":
    """An empty figure of the report's width, laid out without overlaps, free of any global state."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def panels(picture: Any, rows: int, columns: int, used: int | None = None, **kwargs: Any) -> list["Axes"]:
    """A grid of axes in reading order; those beyond `used` are hidden."""
    grid = picture.subplots(rows, columns, squeeze=False, **kwargs)
    flat: list[Axes] = list(grid.flat)
    for axes in flat[rows * columns if used is None else used :]:
        axes.set_visible(False)
    return flat


def plain_decades(axes: "Axes") -> None:
    """A logarithmic y axis that reads 0.1, 1, 10 with 2 and 5 between, for counts over few decades."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    subs = (1.0, 2.0, 5.0) if top / bottom < 3e3 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def colour_of(index: int) -> str:
    """The colour of the index-th site, feature or term, the same in every figure."""
    return PALETTE[index % len(PALETTE)]


def shortened(text: str, limit: int = 48) -> str:
    """The text, with its middle replaced by … where it is longer than the limit."""
    if len(text) <= limit:
        return text
    head = (limit - 1) // 2
    return f"{text[:head]}…{text[len(text) - (limit - 1 - head) :]}"


def plain(text: str) -> str:
    """A name as it is: matplotlib must not read `$` in it as mathematics."""
    return text.replace("$", r"\$")
