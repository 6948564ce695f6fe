"""Numbers, durations and tables as people read them."""

import math
from collections.abc import Collection, Sequence
from typing import Any

NOTHING = "–"
NORMAL_95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


def number(value: Any) -> str:
    """A number with about four digits, or – for anything else: 0.2512, 1.0000, 27.6, 1.30e-05, 10,000, –."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return NOTHING
    if math.isnan(value):
        return "nan"
    if isinstance(value, int) or (
        value == int(value) if math.isfinite(value) and abs(value) < 1e9 else False
    ):
        return f"{int(value):,}"
    if 0.1 <= abs(value) < 10:
        return f"{value:.4f}"  # ratios near 1 line up below each other
    return f"{value:.2e}" if 0 < abs(value) < 1e-3 or abs(value) >= 1e5 else f"{value:.4g}"


def counted_steps(steps: Any) -> str:
    """`1 step`, `10,000 steps`, `– steps` of nothing known."""
    return f"{number(steps)} step{'' if steps == 1 else 's'}"


def duration(seconds: Any) -> str:
    """Seconds in units that fit: 3.2 s, 4 min 05 s, 2 h 10 min."""
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return NOTHING
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def mean_and_spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; the mean alone of a single value, – of none."""
    if not values:
        return NOTHING
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return number(mean)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    if spread <= 1e-12 * abs(mean):
        spread = 0.0  # nothing but the rounding of the mean
    return f"{mean:.4g} ± {spread:.2g}"


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of Wilson for a fraction of successes.

    centre ± half = (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n), with p = successes / trials = x / n.

    Raises:
        ValueError: not 0 ≤ successes ≤ trials, or no trials.
    """
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"got {successes} successes of {trials} trials, must be 0 ≤ successes ≤ trials ≥ 1")
    share, z = successes / trials, NORMAL_95
    scale = 1 + z**2 / trials
    centre = (share + z**2 / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2)) / scale
    return max(centre - half, 0.0), min(centre + half, 1.0)


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers with neighbours drawn together: 0–4, 7; – of none."""
    found: list[list[int]] = []
    for value in sorted(set(numbers)):
        if found and value == found[-1][-1] + 1:
            found[-1].append(value)
        else:
            found.append([value])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in found) or NOTHING


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: int | Collection[int] = 1, indent: str = "  "
) -> list[str]:
    """Lines of a table for the terminal.

    Args:
        header: of the columns.
        rows: of the table.
        left: how many columns, the first ones, are aligned to the left, or which; others are right.
        indent: in front of each line.
    """
    on_the_left = range(left) if isinstance(left, int) else left
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if column in on_the_left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return (indent + "  ".join(aligned)).rstrip()

    return [line(header), indent + "  ".join("─" * width for width in widths), *map(line, rows)]


def clipped(text: str, width: int) -> str:
    """The text, its middle replaced by … where it is wider than allowed."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"
