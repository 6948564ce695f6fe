"""What a number of the configuration does: solved fraction, L0, MMCS and ML2R over its values."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from spd_hydra.figure.style import MUTED, colour_of, new_figure, panels, plain
from spd_hydra.report.sweep import SweepRow, wilson_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Line = Mapping[float, Sequence[SweepRow]]  # by the value of the key, the jobs that were given it

LOGARITHMIC_FROM = 4.0  # the largest value over the smallest
KNOWN = (0, (4, 3))
ASIDE = 0.015  # of the axis between lines, so that their intervals do not hide each other


def draw_range(lines: Mapping[str, Line], label: str) -> "Figure":
    """Three panels over the values of one key, one line per experiment; means, and a point for each run.

    The first is the fraction of jobs with a verdict that are solved, with Wilson's 95 % interval; the second
    L0 over the sites whose ideal L0 is known, with that dashed, or over all sites where none is.

    Args:
        lines: by experiment.
        label: of the x axis.
    """
    from matplotlib.lines import Line2D

    picture = new_figure(height=3.6)
    axes = panels(picture, 1, 3)
    everywhere = sorted({value for line in lines.values() for value in line})
    for index, line in enumerate(lines.values()):
        values = sorted(line)
        colour, shift = colour_of(index), (index - (len(lines) - 1) / 2) * ASIDE
        _draw_solved(axes[0], line, {value: _aside(value, everywhere, shift) for value in values}, colour)
        _draw_means(axes[1], [l0_of(line[value]) for value in values], values, colour)
        _draw_ideals(axes[1], line, values, colour)
        for key, marker in (("mmcs", "o"), ("ml2r", "^")):
            found = [[row.numbers[key] for row in line[value] if key in row.numbers] for value in values]
            _draw_means(axes[2], found, values, colour, marker)
    axes[0].set(title="solved, with 95 % interval", ylim=(-0.04, 1.04))
    axes[1].set(title="L0, dashed: ideal", ylim=(0, None))
    axes[2].set_title("● MMCS  ▲ ML2R")
    axes[2].axhline(1, color=MUTED, linewidth=1.1, linestyle=KNOWN, zorder=0)
    for panel in axes:
        _label(panel, everywhere, label)
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


def _is_logarithmic(values: Sequence[float]) -> bool:
    return bool(values) and values[0] > 0 and values[-1] >= LOGARITHMIC_FROM * values[0]


def _aside(value: float, values: Sequence[float], shift: float) -> float:
    """A value moved by a share of the axis that these values span."""
    if _is_logarithmic(values):
        return float(value * (values[-1] / values[0]) ** shift)
    return value + shift * (values[-1] - values[0])


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


def _label(axes: "Axes", values: Sequence[float], label: str) -> None:
    """The values themselves as ticks while they are few."""
    from matplotlib.ticker import NullLocator

    if _is_logarithmic(values):
        axes.set_xscale("log")
    if len(values) <= 7:
        axes.set_xticks(list(values), [f"{value:g}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(plain(label))
    axes.grid(visible=True)
