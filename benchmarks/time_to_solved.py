"""Seconds from the start of `spd-run` until its decomposition is the known answer.

    python -m benchmarks.time_to_solved --experiments tms_5-2,tms_40-10,resid_mlp1 --seeds 0-2
    python -m benchmarks.time_to_solved --compiler cold --seeds 0

Every run is a fresh process with an empty cache of targets. The compiler's cache is filled before by a short
run (`--compiler warm`) or empty as well (`cold`). One run at a time; one that is finished is not repeated, so
that the command may be stopped and given again. The table is a section of the page of `step_time.py`.
"""

import argparse
import dataclasses
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.recovery import seeds_of
from benchmarks.step_page import machine

from spd_hydra.report.numbers import NOTHING, duration, number
from spd_hydra.run_dir import RunDirectory

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("outputs/time_to_solved")
PAGE = Path("docs/performance.md")
TITLE = "Time to the known answer"
HEADER = [
    "experiment", "compiler's cache", "seeds", "solved at the end", "whole process", "known answer after",
    "at step", "of which target", "compilation", "training", "evaluation",
]  # fmt: skip
_WALL = "wall.json"
_SHORT = ["train.steps=2", "train.restarts.number=1", "model.training.steps=2", "model.training.max_tries=1"]


@dataclasses.dataclass(frozen=True)
class Timed:
    """One finished run.

    Attributes:
        experiment: name of the preset.
        seed: of the run.
        compiler: warm or cold.
        overrides: what it was given, experiment and seed first.
        wall: seconds of the whole process.
        summary: content of summary.json.
        first_step: of the first evaluation that satisfies the known answer, None if none does.
        after: seconds from the start of the process to that evaluation.
        environment: content of environment.json.
    """

    experiment: str
    seed: int
    compiler: str
    overrides: list[str]
    wall: float
    summary: Mapping[str, Any]
    first_step: int | None
    after: float | None
    environment: Mapping[str, Any]


def first_solved_step(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> int | None:
    """Step of the first evaluation that satisfies all that decides about the summary's `solved`."""
    thresholds = summary["thresholds"]
    if not summary["target"]["certified"]:
        return None
    for row in rows:
        if row["split"] != "eval":
            continue
        kind = f"_error_{thresholds['tolerance']:g}/"
        errors = [value for key, value in row.items() if key.startswith("recovery/") and kind in key]
        holds = bool(errors) and not any(errors)
        if thresholds["cosine_decides"]:
            is_near = abs(row["recovery/ml2r"] - 1) <= thresholds["ml2r"]
            holds = holds and row["recovery/mmcs"] >= thresholds["mmcs"] and is_near
        if holds:
            return int(row["step"])
    return None


def seconds_until(step: int, wall: float, summary: Mapping[str, Any]) -> float:
    """Seconds from the start of the process to the evaluation at a step.

    All of the process but the training and evaluation that came later, each step and evaluation taken to last
    as long as the others: those before the choice among several initialisations count, those after it too.
    The report at the end, a second or two, is not taken off.
    """
    restarts = summary["restarts"]
    before = restarts["steps_of_others"] if restarts else 0
    done = (before + step) / (before + summary["steps"])
    seconds = summary["seconds"]
    return wall - float((1 - done) * (seconds["train"] + seconds["eval"]))


def read_timed(folder: Path) -> Timed | None:
    """What a run left in its folder, or None if it did not finish.

    Args:
        folder: holds the wall time and, some levels below, the run directory.
    """
    if not (folder / _WALL).exists():
        return None
    own = json.loads((folder / _WALL).read_text())
    directory = RunDirectory.view(next(folder.rglob("summary.json")).parent)
    summary = directory.read_summary() or {}
    step = first_solved_step(directory.read_metrics(), summary)
    after = None if step is None else seconds_until(step, own["seconds"], summary)
    return Timed(
        experiment=own["experiment"],
        seed=own["seed"],
        compiler=own["compiler"],
        overrides=own["overrides"],
        wall=own["seconds"],
        summary=summary,
        first_step=step,
        after=after,
        environment=directory.read_environment(),
    )


def read_all(out: Path) -> list[Timed]:
    """All finished runs below a folder, by experiment, cache and seed."""
    found = [read_timed(path.parent) for path in out.rglob(_WALL)]
    runs = [run for run in found if run is not None]
    return sorted(runs, key=lambda run: (run.experiment, run.compiler != "warm", run.seed))


def section(runs: Sequence[Timed], command: str) -> str:
    """The section of the page, with its heading."""
    groups: dict[tuple[str, str], list[Timed]] = {}
    for run in runs:
        groups.setdefault((run.experiment, run.compiler), []).append(run)
    machines = dict.fromkeys(machine({"environment": run.environment}) for run in runs)
    return f"""## {TITLE}

{markdown.bullets([f"measured with `{command}`", *machines])}

Each a fresh process of `spd-run` that has to train its target. Median over seeds, in brackets the smallest
and the largest. *known answer after*: from the start of the process to the first evaluation that satisfies
what decides about *solved*, over the seeds that have one; a run evaluates every so many steps. *warm*: the
compiler had compiled this step before; *cold*: its cache was empty.

{markdown.table(HEADER, [_cells(group) for group in groups.values()])}
"""


def _cells(runs: Sequence[Timed]) -> list[str]:
    after = [run.after for run in runs if run.after is not None]
    steps = [float(run.first_step) for run in runs if run.first_step is not None]
    parts = ("target", "compile", "train", "eval")
    missed = f", {len(runs) - len(after)} never" if len(after) < len(runs) else ""
    return [
        runs[0].experiment,
        runs[0].compiler,
        ", ".join(str(run.seed) for run in runs),
        f"{sum(bool(run.summary['solved']) for run in runs)} of {len(runs)}",
        _spread([run.wall for run in runs], duration),
        _spread(after, duration) + missed,
        _spread(steps, number),
        *(_spread([float(run.summary["seconds"][part]) for run in runs], duration) for part in parts),
    ]


def _spread(values: Sequence[float], shown: Any) -> str:
    if not values:
        return NOTHING
    middle: str = shown(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({shown(min(values))} to {shown(max(values))})"


def time_run(out: Path, experiment: str, seed: int, compiler: str, overrides: Sequence[str]) -> Timed:
    """Do one run, unless it is there already.

    Raises:
        RuntimeError: it failed, or what is there was given other overrides.
    """
    folder = out / experiment / compiler / str(seed)
    words = [f"experiment={experiment}", f"seed={seed}", *overrides]
    done = read_timed(folder)
    if done is not None:
        if done.overrides != words:
            given = f"{folder} was given {' '.join(done.overrides)}, now it is {' '.join(words)}"
            raise RuntimeError(f"{given}; take another folder with --out")
        return done
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as empty:
        cache = Path(empty) / "compiler"
        if compiler == "warm":
            cache = out / experiment / "compiler"
            _spd_run(Path(empty) / "before", cache, [*words, *_SHORT], Path(empty) / "before.log")
        wall = _spd_run(folder, cache, words, folder / "log.txt")
    told = {"experiment": experiment, "seed": seed, "compiler": compiler, "seconds": wall, "overrides": words}
    (folder / _WALL).write_text(json.dumps(told, indent=2) + "\n")
    timed = read_timed(folder)
    assert timed is not None, "its wall time was written just now"
    return timed


def _spd_run(out_dir: Path, compiler_cache: Path, words: Sequence[str], log: Path) -> float:
    """Seconds of a process that has no targets in its cache."""
    with tempfile.TemporaryDirectory() as targets, log.open("w") as output:
        variables = {"SPD_CACHE_DIR": targets, "TORCHINDUCTOR_CACHE_DIR": str(compiler_cache.absolute())}
        command = [sys.executable, "-m", "spd_hydra.cli", *words, f"out_dir={out_dir.absolute()}"]
        started = time.perf_counter()
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        )
        seconds = time.perf_counter() - started
    if ended.returncode:
        raise RuntimeError(f"{shlex.join(command[1:])} ended with {ended.returncode}:\n{log.read_text()}")
    return seconds


def main() -> None:
    """Parse the command line, do the runs that are missing, write the table into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="for every run, e.g. train.steps=3000")
    parser.add_argument("--experiments", default="tms_5-2,tms_40-10,resid_mlp1", metavar="NAME,…")
    parser.add_argument("--seeds", type=seeds_of, default=[0, 1, 2], help="e.g. 0-4,7")
    parser.add_argument("--compiler", default="warm", choices=["warm", "cold", "both"])
    parser.add_argument("--out", type=Path, default=OUT, help="a folder per set of overrides")
    parser.add_argument("--write", type=Path, help=f"put the table into this page, e.g. {PAGE}")
    arguments = parser.parse_intermixed_args()
    ways = ("warm", "cold") if arguments.compiler == "both" else (arguments.compiler,)
    for experiment in arguments.experiments.split(","):
        for compiler in ways:
            for seed in arguments.seeds:
                run = time_run(arguments.out, experiment, seed, compiler, arguments.overrides)
                print(f"{experiment} seed {seed}, {compiler}: {duration(run.wall)}, known answer after "
                      f"{duration(run.after)}", flush=True)  # fmt: skip
    command = shlex.join(["python", "-m", "benchmarks.time_to_solved", *sys.argv[1:]])
    text = section(read_all(arguments.out), command)
    print(f"\n{text}")
    if arguments.write:
        markdown.write_section(arguments.write, TITLE, text)


if __name__ == "__main__":
    main()
