"""Pictures of a sweep: what its one number does, and causal importances side by side for each value."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_hydra import atomic
from spd_hydra.figure.base import Drawn, as_png
from spd_hydra.figure.style import drawing_style
from spd_hydra.report.page import embedded
from spd_hydra.report.range_figure import draw_range, range_panels
from spd_hydra.report.sweep import SweepRow, varying_keys

log = logging.getLogger(__name__)

HEATMAPS = "causal_importance.png"
MOST_HEATMAPS = 24  # each is some 50 kB of the page


def swept_number(rows: Sequence[SweepRow]) -> str | None:
    """The one key besides experiment and seed in which jobs differ, if its values are numbers."""
    keys = [key for key in varying_keys(rows) if key != "experiment"]
    if len(keys) != 1:
        return None
    values = [_number(row.overrides.get(keys[0])) for row in rows]
    return keys[0] if None not in values and len(set(values)) > 1 else None


def range_picture(sweep_dir: Path, rows: Sequence[SweepRow]) -> dict[str, Any] | None:
    """Draw what the sweep's number does into `<sweep>/figures/<key>.png`; the picture for the page.

    None where the jobs differ in no single number, where none is done, or where it could not be drawn or
    written, which is logged: a picture is never a reason to lose a sweep.
    """
    key = swept_number(rows)
    done = [row for row in rows if row.state == "done"]
    if key is None or not done:
        return None
    path = sweep_dir / "figures" / f"{key.replace('/', '_')}.png"
    try:
        with drawing_style():
            png = as_png(draw_range(_lines(done, key), key))
        path.parent.mkdir(exist_ok=True)
        atomic.replace(path, png)
    except Exception:
        log.warning("the picture of %s could not be drawn; the sweep goes on without it", key, exc_info=True)
        return None
    *words, last = [panel.words for panel in range_panels(done)]
    told = f"{', '.join(words)}, and {last}" if words else last
    caption = f"Over {key}: {told}; lines join means over seeds, pale points are single runs."
    found, _ = embedded([Drawn(name=key, caption=caption, path=path)])
    return found[0] if found else None


def heatmaps(sweep_dir: Path, rows: Sequence[SweepRow]) -> list[dict[str, Any]]:
    """Causal importances on single features, one run for each value of the sweep's number.

    The run of the lowest seed that is done and has the figure; empty where jobs differ in no single number.
    Paper, figures 12 and 13.
    """
    key = swept_number(rows)
    if key is None:
        return []
    lines = _lines([row for row in rows if row.state == "done"], key)
    drawn = []
    for experiment, line in lines.items():
        for value in sorted(line):
            paths = {row.folder: sweep_dir / row.folder / "figures" / HEATMAPS for row in line[value]}
            rows_drawn = [row for row in line[value] if paths[row.folder].is_file()]
            if not rows_drawn:
                continue
            first = min(rows_drawn, key=lambda row: (row.seed is None, row.seed, row.job))
            caption = _caption(first, key, experiment if len(lines) > 1 else "")
            drawn.append(Drawn(name=f"job {first.folder}", caption=caption, path=paths[first.folder]))
    pictures, missing = embedded(drawn[:MOST_HEATMAPS])
    for text in missing:
        log.warning("%s", text)
    return pictures


def _caption(row: SweepRow, key: str, experiment: str) -> str:
    verdict = "no known answer" if row.solved is None else "solved" if row.solved else "not solved"
    words = [experiment, f"{key}={row.overrides[key]}", f"seed {row.seed}", verdict]
    return ", ".join(word for word in words if word)


def _lines(rows: Sequence[SweepRow], key: str) -> Mapping[str, dict[float, list[SweepRow]]]:
    """Jobs by experiment and value."""
    lines: dict[str, dict[float, list[SweepRow]]] = {}
    for row in rows:
        value = _number(row.overrides.get(key))
        if value is not None:
            lines.setdefault(row.experiment or "", {}).setdefault(value, []).append(row)
    return lines


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
