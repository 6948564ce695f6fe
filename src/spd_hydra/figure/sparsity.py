"""L0 and alive subcomponents over the training steps, beside their known values."""

from collections import Counter
from typing import TYPE_CHECKING, Any

from spd_hydra.figure.base import History, captioned, figure
from spd_hydra.figure.columns import expected_of
from spd_hydra.figure.curves import Series, label_steps, series, thinned
from spd_hydra.figure.site_names import site_labels
from spd_hydra.figure.style import (
    FAINT,
    INK,
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

KNOWN = (0, (4, 3))
MOST_SITES = 8  # beyond, single sites are grey and only the total has a colour


_WITH_KNOWN = (
    "Subcomponents active per position (L0) and alive at all over training, dashed where the known answer "
    "is: the number alive should come down to its dashed line and stay there, L0 end near its own, often "
    "somewhat below since inputs near 0 need no subcomponent, and one that still falls at the end asks for "
    "more steps."
)


@figure(
    "sparsity",
    "Subcomponents active per position (L0) and alive at all over training: both should come down and stay "
    "there, and one that still falls at the end asks for more steps.",
)
def draw(evaluation: Evaluation, history: History) -> "Figure | None":
    """Curves per site; ideal L0 from the metrics `l0_ideal/<site>`, expected alive counts from the checks."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    l0, alive = _merged(history, "l0"), _merged(history, "alive")
    if not l0 and not alive:
        return None
    picture = new_figure(height=3.7)
    left, right = panels(picture, 1, 2)
    ideal = {
        key.removeprefix("l0_ideal/"): value
        for key, value in evaluation.metrics.items()
        if key.startswith("l0_ideal/")
    }
    expected = {site: e for site in evaluation.sites if (e := expected_of(evaluation, site)) is not None}
    names = list(dict.fromkeys([*evaluation.sites, *l0, *alive]))
    _draw_curves(left, l0, names, ideal)
    left.set(
        title=f"L0: active per position (g > {evaluation.ci_threshold:g})", ylabel="subcomponents, log scale"
    )
    plain_decades(left)
    _draw_curves(right, alive, names, {site: float(number) for site, number in expected.items()})
    right.set_title("alive: active anywhere in the evaluation data")
    right.set_ylim(bottom=0)
    right.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    entries: dict[str, Any] = {}
    for panel in (left, right):
        entries |= {label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    is_dashed = bool(ideal or expected) and len(names) - ("total" in names) <= MOST_SITES
    if is_dashed:
        entries["known answer"] = Line2D([], [], color=MUTED, linewidth=1.1, linestyle=KNOWN)
    picture.legend(
        list(entries.values()), list(entries), loc="outside lower center", ncols=min(len(entries), 5)
    )
    return captioned(picture, _WITH_KNOWN) if is_dashed else picture


def _merged(history: History, group: str) -> dict[str, Series]:
    """Evaluations measure more data than a training batch; where a name has none, its training rows serve."""
    return {**series(history, "train", group), **series(history, "eval", group)}


def _draw_curves(axes: "Axes", found: dict[str, Series], names: list[str], known: dict[str, float]) -> None:
    sites = [name for name in names if name != "total"]
    many, labels = len(sites) > MOST_SITES, {"total": "total"} | site_labels(sites, 30)
    grey_label = "single sites"
    for index, name in enumerate(names):
        colour = INK if name == "total" else FAINT if many else colour_of(index)
        if name in found:
            steps, values = thinned(found[name])
            label = plain(labels[name])
            if many and name != "total":
                label, grey_label = grey_label, "_nolegend_"
            marker = "o" if len(steps) <= 40 else ""
            axes.plot(steps, values, color=colour, marker=marker, markersize=3.5, label=label,
                      linewidth=1.0 if many and name != "total" else 1.6)  # fmt: skip
        if name in known and not many:
            axes.axhline(known[name], color=colour, linewidth=1.1, linestyle=KNOWN)
    if not many:
        _name_known(axes, [known[name] for name in names if name in known])
    axes.set_xlim(left=0)  # the first evaluation is not the beginning; ticks at round numbers
    label_steps(axes)
    if not found:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=MUTED)


def _name_known(axes: "Axes", values: list[float]) -> None:
    """Write the known values beside the panel, where lines on top of each other show but one of them."""
    places = {f"{value:.3g}": value for value in values}
    for text, number in Counter(f"{value:.3g}" for value in values).items():
        axes.annotate(
            text + (f" ({number} sites)" if number > 1 else ""), (1, places[text]),
            xycoords=axes.get_yaxis_transform(), xytext=(3, 0), textcoords="offset points", va="center",
            fontsize=8, color=MUTED, annotation_clip=False,
        )  # fmt: skip
