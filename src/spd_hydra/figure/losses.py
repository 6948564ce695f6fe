"""Every loss term over the training steps."""

from typing import TYPE_CHECKING, Any

from spd_hydra.figure.base import History, figure
from spd_hydra.figure.curves import Series, label_steps, series, thinned
from spd_hydra.figure.style import INK, PALETTE, new_figure, plain, shortened
from spd_hydra.metric.evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1, 1.5))]
MARKERS = ["o", "s", "^"]

# The terms seen in most runs keep their colours whichever others are on.
USUAL = [
    "stochastic_recon",
    "importance_minimality",
    "stochastic_recon_layerwise",
    "faithfulness",
    "stochastic_recon_subset",
    "ci_masked_recon",
    "unmasked_recon",
]


@figure(
    "losses",
    "Loss terms over training, each before its coefficient, the total with them, lines from training batches "
    "and points from evaluations: reconstruction should fall and stay low while importance minimality goes "
    "down, and a late rise is a warning of collapse, but where the exponent p is annealed importance "
    "minimality rises with it, as g^p does where 0 < g < 1, and while a squeeze multiplies its coefficient "
    "the total does too.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """Log-scaled curves of every term that is ever above 0; the total in black."""
    from matplotlib.ticker import NullLocator

    train, measured = series(history, "train", "loss"), series(history, "eval", "loss")
    names = [
        n
        for n in dict.fromkeys([*train, *measured])
        if _ever_positive(train, n) or _ever_positive(measured, n)
    ]
    if not names:
        return None
    names.sort(key=lambda name: (name != "total", USUAL.index(name) if name in USUAL else len(USUAL), name))
    picture = new_figure(height=4.2)
    axes = picture.subplots()
    for name in names:
        colour, dash, marker = _look(name, names)
        wide = 2.2 if name == "total" else 1.4
        if name in train:
            steps, values = thinned(_positive(train[name]))
            axes.plot(
                steps, values, color=colour, linestyle=dash, linewidth=wide, label=plain(shortened(name, 34))
            )
        if name in measured:
            steps, values = _positive(measured[name])
            label = None if name in train else f"{plain(shortened(name, 26))} (eval)"
            axes.plot(
                steps, values, linestyle="", color=colour, marker=marker, markersize=4.5, label=label,
                zorder=3, markeredgecolor="white", markeredgewidth=0.6,
            )  # fmt: skip
    axes.set(yscale="log", ylabel="loss")
    axes.yaxis.set_minor_locator(NullLocator())
    label_steps(axes)
    picture.legend(loc="outside right upper")
    return picture


def _look(name: str, names: list[str]) -> tuple[str, Any, str]:
    if name == "total":
        return INK, "-", "o"
    others = [n for n in names if n not in USUAL and n != "total"]
    index = USUAL.index(name) if name in USUAL else len(USUAL) + others.index(name)
    turn = index // len(PALETTE)
    return PALETTE[index % len(PALETTE)], DASHES[turn % len(DASHES)], MARKERS[turn % len(MARKERS)]


def _positive(points: Series) -> Series:
    """The points that a logarithmic axis can show."""
    steps, values = points
    return steps[values > 0], values[values > 0]


def _ever_positive(found: dict[str, Series], name: str) -> bool:
    return name in found and bool((found[name][1] > 0).any())
