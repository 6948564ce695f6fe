"""Train experiments with their importance coefficient times several factors, and draw what that does.

    python -m benchmarks.coefficient_range --experiments tms_5-2,tms_40-10 --factors 0.5,1,2 --seeds 0-2
    python -m benchmarks.coefficient_range --table-only

Each run is a process of its own and ends in <out>/factor_<factor>/<experiment>/<seed>/. A run that has a
summary is not repeated, so the command may be stopped and given again. With --write the table and the picture
are a page; without, the table is printed.
"""

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.markdown import bullets, table
from benchmarks.recovery import PLAN, ROOT, remember, run_all, seeds_of, to_do
from benchmarks.recovery_page import facts
from benchmarks.recovery_runs import Run, read_runs

from spd_hydra import atomic
from spd_hydra.composer import Composer
from spd_hydra.exit_code import ExitCode
from spd_hydra.figure.base import as_png
from spd_hydra.figure.style import drawing_style
from spd_hydra.report.numbers import NOTHING, mean_and_spread
from spd_hydra.report.range_figure import draw_range, ideal_l0, l0_of
from spd_hydra.report.sweep import SweepRow, sweep_groups
from spd_hydra.section import ConfigError

OUT = Path("outputs/coefficient_range")
PICTURE = Path("docs/images/results/coefficient_range.png")
KEY = "loss.importance_minimality.coeff"
PRESET = 1.0  # the factor between whose sides an experiment without runs at it says nothing
LABEL = "importance coefficient over the preset's"
HEADER = ["experiment", "factor", "coefficient", "solved, 95 % interval", "L0 (ideal)", "MMCS", "ML2R"]


@dataclasses.dataclass(frozen=True)
class Cell:
    """One experiment with one factor: its coefficient and its runs."""

    experiment: str
    factor: float
    coeff: float
    runs: list[Run]

    @property
    def rows(self) -> list[SweepRow]:
        """What came of the runs that are done."""
        return [run.row for run in self.runs if run.row.state == "done"]


def factors_of(text: str) -> list[float]:
    """Factors written as `0.25,1,4`.

    Raises:
        ValueError: it is written in another way, or a factor is not above 0.
    """
    found = sorted({float(part) for part in text.split(",")})
    if found[0] <= 0:
        raise ValueError(f"got the factor {found[0]:g}, must be > 0")
    return found


def presets(experiments: Sequence[str]) -> dict[str, float]:
    """The importance coefficient of each experiment as it is shipped.

    Raises:
        ConfigError: there is no such experiment.
    """
    with Composer.open() as composer:
        configs = {name: composer.run_config([f"experiment={name}"]) for name in experiments}
    return {name: config.loss.importance_minimality.coeff for name, config in configs.items()}


def read_cells(out: Path) -> list[Cell]:
    """All planned runs in the folder, by experiment and factor."""
    cells = []
    for plan_file in out.glob(f"factor_*/*/{PLAN}"):
        folder, factor = plan_file.parent, float(plan_file.parents[1].name.removeprefix("factor_"))
        plan = json.loads(plan_file.read_text())
        (coeff,) = [text.partition("=")[2] for text in plan["overrides"] if text.startswith(f"{KEY}=")]
        for experiment, seeds in plan["seeds"].items():
            runs = read_runs(folder, {experiment: seeds})
            cells.append(Cell(experiment=experiment, factor=factor, coeff=float(coeff), runs=runs))
    return sorted(cells, key=lambda cell: (cell.experiment, cell.factor))


def section(cells: Sequence[Cell]) -> str:
    """The table in Markdown."""
    return table(HEADER, [_cells_of(cell) for cell in cells])


def _cells_of(cell: Cell) -> list[str]:
    groups = sweep_groups([dataclasses.replace(row, overrides={}) for row in cell.rows])
    l0 = mean_and_spread(l0_of(cell.rows))
    ideals = [ideal for row in cell.rows if (ideal := ideal_l0(row)) is not None]
    unfinished = len(cell.runs) - len(cell.rows)
    missing = f", {unfinished} without a result" if unfinished else ""
    return [
        cell.experiment,
        f"{cell.factor:g}",
        f"{cell.coeff:g}",
        (groups[0].fraction if groups else NOTHING) + missing,
        f"{l0} ({ideals[0]:g})" if ideals else l0,
        groups[0].spread["mmcs"] if groups else NOTHING,
        groups[0].spread["ml2r"] if groups else NOTHING,
    ]


def draw(cells: Sequence[Cell], path: Path) -> None:
    """Draw all experiments that have a finished run."""
    lines: dict[str, dict[float, list[SweepRow]]] = {}
    for cell in cells:
        if cell.rows:
            lines.setdefault(cell.experiment, {})[cell.factor] = cell.rows
    if not lines:
        return
    with drawing_style():
        png = as_png(draw_range(lines, LABEL, through=PRESET))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.replace(path, png)
    print(path)


def page(cells: Sequence[Cell], picture: str) -> str:
    """The page in Markdown: table, picture, where and how it was measured.

    Args:
        cells: from `read_cells`.
        picture: where the picture lies, seen from the page.
    """
    runs = [run for cell in cells for run in cell.runs]
    return f"""# How far off the importance coefficient may be

Generated by `python -m benchmarks.coefficient_range --write` from the `summary.json` of every run; do not
edit.

Every experiment with `{KEY}` times a factor; factor 1 is the
preset. *solved*, *MMCS*, *ML2R*: as in [results](results.md), mean ± standard deviation over seeds. *L0*:
subcomponents that are needed per input, beside what it would be in a perfect decomposition.

{section(cells)}

![Solved fraction, L0, MMCS and ML2R over the factor, a line per experiment]({picture})

## Where it was measured

{bullets(facts(runs))}

## How to get it again

{bullets([f"`{command}`" for command in commands(cells)])}
"""


def commands(cells: Sequence[Cell]) -> list[str]:
    """A command line for each set of experiments that have the same factors and seeds."""
    plans: dict[str, tuple[list[float], list[int]]] = {}
    for cell in cells:
        factors, seeds = plans.setdefault(cell.experiment, ([], []))
        factors.append(cell.factor)
        seeds += [run.seed for run in cell.runs if run.seed not in seeds]
    found: dict[str, list[str]] = {}
    for experiment, (factors, seeds) in plans.items():
        key = f"--factors {','.join(f'{f:g}' for f in factors)} --seeds {','.join(map(str, sorted(seeds)))}"
        found.setdefault(key, []).append(experiment)
    return [
        f"python -m benchmarks.coefficient_range --experiments {','.join(names)} {key}"
        for key, names in found.items()
    ]


def main() -> int:
    """Parse the command line, run what is missing, draw and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="for every run, e.g. train.steps=20000")
    parser.add_argument("--experiments", default="tms_5-2,tms_40-10", help="separated by commas")
    parser.add_argument("--factors", type=factors_of, default="0.25,0.5,1,2,4", help="separated by commas")
    parser.add_argument("--seeds", type=seeds_of, default="0-2", help="e.g. 0-4,7")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--picture", type=Path, help=f"default {PICTURE}, or in <out> with another --out")
    parser.add_argument("--write", type=Path, help="page to write, e.g. docs/coefficient_range.md")
    parser.add_argument("--table-only", action="store_true", help="draw and write what is there")
    arguments = parser.parse_intermixed_args()
    try:
        if not arguments.table_only:
            _run(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ExitCode.bad_config
    except KeyboardInterrupt:
        print("stopped; give the same command again to go on", file=sys.stderr)
        return ExitCode.interrupted
    cells = read_cells(arguments.out)
    own = ROOT / PICTURE if arguments.out == OUT else arguments.out / PICTURE.name
    picture = arguments.picture or own
    draw(cells, picture)
    if arguments.write is None:
        print(section(cells))
    else:
        place = os.path.relpath(picture.absolute(), arguments.write.absolute().parent)
        atomic.replace(arguments.write, page(cells, Path(place).as_posix()))
        print(arguments.write)
    return ExitCode.ok


def _run(arguments: argparse.Namespace) -> None:
    experiments = arguments.experiments.split(",")
    coefficients = presets(experiments)
    command = shlex.join(["python", "-m", "benchmarks.coefficient_range", *sys.argv[1:]])
    for factor in arguments.factors:
        for experiment in experiments:
            coeff = f"{KEY}={coefficients[experiment] * factor:g}"
            common = [f"threads={arguments.threads}", *arguments.overrides, coeff]
            folder, plan = arguments.out / f"factor_{factor:g}" / experiment, {experiment: arguments.seeds}
            missing = to_do(folder, plan, common)
            remember(folder, plan, common, command)
            print(
                f"{experiment} x {factor:g}: {len(missing)} of {len(arguments.seeds)} runs to do", flush=True
            )
            run_all(folder, missing, common, jobs=arguments.jobs, threads=arguments.threads)


if __name__ == "__main__":
    sys.exit(main())
