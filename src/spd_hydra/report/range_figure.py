"""What a number of the configuration does: to the verdict, or what masked models keep, and to L0."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from spd_hydra.figure.style import MUTED, WIDTH, colour_of, new_figure, panels, plain, plain_decades
from spd_hydra.report.numbers import wilson_interval
from spd_hydra.report.quantities import QUANTITIES
from spd_hydra.report.sweep import SweepRow
from spd_hydra.report.value_axis import is_logarithmic, label_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[float, Sequence[SweepRow]]  # by the value of the key, the jobs that were given it

BESIDE = 0.8  # inches of a panel that its axis does not have
KNOWN = (0, (4, 3))
ABOVE = 1.08  # the top of an axis over its highest point
TWO_LABELS = 6.5  # an axis of this top over its bottom has two of 1, 2, 5, 10, …
NEAREST = 1e-4  # distances from 1 below this are drawn as this
ASIDE = 0.015  # of the axis between lines, so that their intervals do not hide each other


class Panel(NamedTuple):
    """One panel: its title, its y axis, its words in a caption, how a line is drawn, its axis after them."""

    title: str
    label: str
    words: str
    draw: Callable[["Axes", Line, Mapping[float, float], str], None]
    finish: Callable[["Axes"], None]


def range_panels(rows: Sequence[SweepRow]) -> list[Panel]:
    """What there is to show of these jobs.

    The fraction of jobs with a verdict that are solved, with Wilson's 95 % interval, or, where none has a
    verdict, the share of cross-entropy that masks g recover. L0 over the sites whose ideal L0 is known, with
    that dashed, or over all sites where none is. MMCS and ML2R, as distances from 1 on a logarithmic axis,
    which tells 0.99 from 0.97; or, where there are none, the divergence with masks g.
    """
    measured = {name for row in rows for name in row.numbers}
    title = "L0, dashed: ideal" if any(ideal_l0(row) is not None for row in rows) else "L0"
    label = "subcomponents per position"
    found = [Panel(title, label, "how many subcomponents are active per position", _draw_l0, _from_0)]
    if any(row.solved is not None for row in rows):
        title, label = "solved, with 95 % interval", "share of jobs"
        found.insert(0, Panel(title, label, "how many jobs are solved", _draw_solved, _share))
    elif "ce_recovered" in measured:
        words = "how much of the cross-entropy masks of causal importances recover"
        title, label = "CE recovered with masks g, %", "% of the cross-entropy"
        found.insert(0, Panel(title, label, words, _draw_recovered, _dashed(100)))
    if {"mmcs", "ml2r"} & measured:
        words = "how far their directions and sizes are from a perfect match (lower is better)"
        found.append(Panel("1 – MMCS ●, |1 – ML2R| ▲", "distance from 1", words, _draw_sizes, _decades))
    elif divergence := next((name for name in ("kl", "mse") if name in measured), None):
        name = QUANTITIES[divergence]
        words = f"the {name} from the target with masks of causal importances"
        found.append(Panel(f"{name} with masks g", name, words, _draw_quantity(divergence), _from_0))
    return found


def draw_range(lines: Mapping[str, Line], label: str, *, through: float | None = None) -> "Figure":
    """Up to three panels over the values of one key, as `range_panels` says, one line per experiment.

    Means, and a pale point for each run.

    Args:
        lines: by experiment.
        label: of the x axis.
        through: a value that is known to matter: a line that lacks it is not drawn across it.
    """
    from matplotlib.lines import Line2D

    found = range_panels([row for line in lines.values() for own in line.values() for row in own])
    picture = new_figure(height=3.6)
    axes = panels(picture, 1, len(found))
    everywhere = sorted({value for line in lines.values() for value in line})
    for panel, kind in zip(axes, found, strict=True):
        for index, line in enumerate(lines.values()):
            shift = (index - (len(lines) - 1) / 2) * ASIDE
            for piece in _pieces(line, through):
                places = {value: _aside(value, everywhere, shift) for value in piece}
                kind.draw(panel, line, places, colour_of(index))
        panel.set(title=kind.title, ylabel=kind.label)
        kind.finish(panel)
        label_values(panel, everywhere, label, WIDTH / len(found) - BESIDE)
    if len(lines) > 1:
        handles = [Line2D([], [], color=colour_of(i), marker="o") for i in range(len(lines))]
        picture.legend(handles, [plain(name) for name in lines], loc="outside lower center", ncols=5)
    return picture


def l0_of(rows: Sequence[SweepRow]) -> list[float]:
    """L0 of each job over the sites whose ideal L0 is known, or over all sites where none is."""
    found = []
    for row in rows:
        known = [key for key in row.numbers if key.startswith("l0_ideal.")]
        sites = [row.numbers.get(f"l0.{key.removeprefix('l0_ideal.')}") for key in known]
        single = [value for value in sites if value is not None]
        if single:
            found.append(sum(single))
        elif "l0" in row.numbers:
            found.append(row.numbers["l0"])
    return found


def ideal_l0(row: SweepRow) -> float | None:
    """The ideal L0 over the sites where it is known, None where it is at none."""
    known = [value for key, value in row.numbers.items() if key.startswith("l0_ideal.")]
    return sum(known) if known else None


def _pieces(line: Line, through: float | None) -> list[list[float]]:
    """The sorted values of a line in one piece, or in two where it lacks the value between them."""
    values = sorted(line)
    if through is None or through in line:
        return [values]
    both = [value for value in values if value < through], [value for value in values if value > through]
    return [piece for piece in both if piece]


def _aside(value: float, values: Sequence[float], shift: float) -> float:
    """A value moved by a share of the axis that these values span."""
    if is_logarithmic(values):
        return float(value * (values[-1] / values[0]) ** shift)
    return value + shift * (values[-1] - values[0])


def _share(axes: "Axes") -> None:
    axes.set_ylim(-0.04, 1.04)


def _from_0(axes: "Axes") -> None:
    """From 0 to above the highest point, however near each other they are."""
    highest = float(axes.dataLim.y1)
    axes.set_ylim(0, ABOVE * highest if highest > 0 else None)


def _decades(axes: "Axes") -> None:
    """Logarithmic, and wide enough for two labels, however near each other the points are."""
    lowest, highest = float(axes.dataLim.y0), float(axes.dataLim.y1)
    if 0 < lowest <= highest < math.inf:
        beyond = max(ABOVE, math.sqrt(TWO_LABELS * lowest / highest))
        axes.set_ylim(lowest / beyond, highest * beyond)
    plain_decades(axes)


def _dashed(level: float) -> Callable[["Axes"], None]:
    def draw(axes: "Axes") -> None:
        axes.axhline(level, color=MUTED, linewidth=1.1, linestyle=KNOWN, zorder=0)

    return draw


def _draw_l0(axes: "Axes", line: Line, places: Mapping[float, float], colour: str) -> None:
    values = list(places)
    _draw_means(axes, [l0_of(line[value]) for value in values], values, colour)
    _draw_ideals(axes, line, values, colour)


def _draw_sizes(axes: "Axes", line: Line, places: Mapping[float, float], colour: str) -> None:
    for name, marker in (("mmcs", "o"), ("ml2r", "^")):
        own = [[_from_1(row.numbers[name]) for row in line[v] if name in row.numbers] for v in places]
        _draw_means(axes, own, list(places), colour, marker)


def _from_1(value: float) -> float:
    return max(abs(1 - value), NEAREST)


def _draw_recovered(axes: "Axes", line: Line, places: Mapping[float, float], colour: str) -> None:
    _draw_quantity("ce_recovered", scale=100)(axes, line, places, colour)


def _draw_quantity(
    name: str, marker: str = "o", scale: float = 1
) -> Callable[["Axes", Line, Mapping[float, float], str], None]:
    def draw(axes: "Axes", line: Line, places: Mapping[float, float], colour: str) -> None:
        own = [[scale * row.numbers[name] for row in line[v] if name in row.numbers] for v in places]
        _draw_means(axes, own, list(places), colour, marker)

    return draw


def _draw_ideals(axes: "Axes", line: Line, values: Sequence[float], colour: str) -> None:
    """The ideal L0: across the panel, or, where the number that is varied moves it, from value to value."""
    ideals = [[ideal for row in line[value] if (ideal := ideal_l0(row)) is not None] for value in values]
    known = [(value, own[0]) for value, own in zip(values, ideals, strict=True) if own]
    if len({ideal for _, ideal in known}) == 1:
        axes.axhline(known[0][1], color=colour, linewidth=1.1, linestyle=KNOWN)
    elif known:
        axes.plot(*zip(*known, strict=True), color=colour, linewidth=1.1, linestyle=KNOWN)


def _draw_solved(axes: "Axes", line: Line, places: Mapping[float, float], colour: str) -> None:
    judged = {value: [row for row in line[value] if row.solved is not None] for value in places}
    values = [value for value in places if judged[value]]
    if not values:
        return
    counts = [(sum(bool(row.solved) for row in judged[value]), len(judged[value])) for value in values]
    shares = [solved / trials for solved, trials in counts]
    intervals = [wilson_interval(*count) for count in counts]
    below = [max(share - low, 0.0) for share, (low, _) in zip(shares, intervals, strict=True)]
    above = [max(high - share, 0.0) for share, (_, high) in zip(shares, intervals, strict=True)]
    axes.errorbar(
        [places[value] for value in values], shares, yerr=[below, above], color=colour, marker="o",
        markersize=5, capsize=3, elinewidth=1.0,
    )  # fmt: skip


def _draw_means(
    axes: "Axes",
    found: Sequence[Sequence[float]],
    values: Sequence[float],
    colour: str,
    marker: str = "o",
) -> None:
    """The mean over the jobs at each value, and a pale point for each job."""
    shown = [(value, own) for value, own in zip(values, found, strict=True) if own]
    if not shown:
        return
    axes.plot(
        [value for value, own in shown for _ in own], [x for _, own in shown for x in own], marker,
        color=colour, markersize=3.5, alpha=0.35, markeredgewidth=0, linestyle="none",
    )  # fmt: skip
    means = [sum(own) / len(own) for _, own in shown]
    axes.plot([value for value, _ in shown], means, color=colour, marker=marker, markersize=5)
