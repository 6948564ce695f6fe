"""A sweep as files: sweep.csv for further work, sweep.html to look at."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spd_hydra import atomic
from spd_hydra.report import published
from spd_hydra.report.html import render
from spd_hydra.report.quantities import QUANTITIES, written
from spd_hydra.report.sweep import SweepRow, is_shown, sweep_groups, varying_keys
from spd_hydra.report.sweep_pictures import heatmaps, range_picture

JUDGED = ["solved", "strict", "certified"]


def write_sweep(sweep_dir: Path, rows: Sequence[SweepRow]) -> tuple[Path, Path]:
    """Write sweep.csv and sweep.html, one row per job, replacing older ones, and return their paths.

    The page groups jobs that differ only in the seed: mean ± standard deviation, and the solved fraction
    with its 95 % interval (Wilson). Columns in which no finished job has anything are on the page left out.
    Below stand the toys beside what is published of them. Where jobs differ in one number it shows a picture
    of what that does.

    Raises:
        OSError: the directory cannot be written.
    """
    table, page = sweep_dir / "sweep.csv", sweep_dir / "sweep.html"
    atomic.replace(table, _as_csv(rows))
    keys = varying_keys(rows)
    shown = [name for name in QUANTITIES if any(name in row.numbers for row in rows)]
    content = render(
        "sweep_template.html",
        title=f"Sweep {sweep_dir.absolute().name}",
        states={state: sum(row.state == state for row in rows) for state in _states(rows)},
        keys=keys,
        seeds=["seed"] if is_shown(rows, "seed") else [],
        judged=[name for name in JUDGED if is_shown(rows, name)],
        shown=shown,
        headings=QUANTITIES,
        written=written,
        rows=rows,
        groups=sweep_groups(rows),
        picture=range_picture(sweep_dir, rows),
        heatmaps=heatmaps(sweep_dir, rows),
        published_header=published.HEADER,
        published=published.beside_the_paper(rows),
        published_note=published.notes(rows),
    )
    atomic.replace(page, content)
    return table, page


def _states(rows: Sequence[SweepRow]) -> list[str]:
    return [
        state
        for state in ("done", "running", "requeued", "pending", "stopped", "failed", "missing")
        if any(row.state == state for row in rows)
    ]


def _as_csv(rows: Sequence[SweepRow]) -> str:
    overrides = dict.fromkeys(
        key for row in rows for key in row.overrides if key not in {"seed", "experiment"}
    )
    names = dict.fromkeys(name for row in rows for name in row.numbers)
    replica = ["replica"] if any(row.replica is not None for row in rows) else []
    fixed = ["job", *replica, "id", "state", "experiment", "seed"]
    ended = ["finding", "exit", "error", "report"]
    header = [*fixed, *overrides, *JUDGED, *names, *ended]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        values: list[Any] = [getattr(row, name) for name in fixed]
        values += [row.overrides.get(key) for key in overrides]
        values += [getattr(row, name) for name in JUDGED]
        values += [row.numbers.get(name) for name in names]
        values += [getattr(row, name) for name in ended]
        writer.writerow(["" if value is None else value for value in values])
    return text.getvalue()
