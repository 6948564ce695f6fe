"""Train every toy over its seeds and write the table of known answers found.

    python -m benchmarks.recovery --jobs 2
    python -m benchmarks.recovery --rows tms_5-2 --seeds 0-4
    python -m benchmarks.recovery --table-only
    python -m benchmarks.recovery --table-only --pictures

Each run is a process of its own and ends in <out>/<experiment>/<seed>/. A run that has a summary is not
repeated, so the command may be stopped and given again; a run that was stopped half-way or failed starts
afresh, so that its times are those of a whole run.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.recovery_page import page
from benchmarks.recovery_pictures import copy_pictures
from benchmarks.recovery_runs import found, read_runs

from spd_hydra.cli_task import guarded
from spd_hydra.composer import Composer
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.exit_code import ExitCode
from spd_hydra.run import run
from spd_hydra.run_dir import RunDirectory, RunDirectoryError
from spd_hydra.saved_config import differences, load_config
from spd_hydra.section import ConfigError

ROOT = Path(__file__).resolve().parents[1]
OUT = Path("outputs/recovery")
PAGE = Path("docs/results.md")
PLAN = "recovery.json"
ROWS: dict[str, range] = {
    "tms_5-2": range(20),
    "tms_5-2-id": range(20),
    "tms_40-10": range(20),
    "tms_40-10-id": range(20),
    "resid_mlp1": range(20),
    "resid_mlp2": range(5),
    "resid_mlp3": range(3),
    "tms_5-2-untied": range(20),
}
_NOT_PART_OF_THE_RESULT = ("out_dir", "cache_dir", "logger")


def seeds_of(text: str) -> list[int]:
    """Seeds written as `0-4,7`.

    Raises:
        ValueError: it is written in another way.
    """
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return sorted(set(found))


def overrides_of(experiment: str, seed: int, common: Sequence[str]) -> list[str]:
    """What one run is given."""
    return [f"experiment={experiment}", f"seed={seed}", *common]


def in_order(seeds: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The same with the experiments of the table first, in its order."""
    names = [*(name for name in ROWS if name in seeds), *(name for name in seeds if name not in ROWS)]
    return {name: seeds[name] for name in names}


def remember(out: Path, plan: Mapping[str, Sequence[int]], common: Sequence[str], command: str) -> None:
    """Add these runs to the plan in the folder.

    Raises:
        ConfigError: the runs that are there were given other overrides.
    """
    path = out / PLAN
    known = json.loads(path.read_text()) if path.exists() else {}
    if known and known["overrides"] != list(common):
        raise ConfigError(
            f"{out} holds runs with the overrides {known['overrides']}, now they are {list(common)}; "
            "take another folder with --out"
        )
    seeds = {name: set(own) for name, own in known.get("seeds", {}).items()}
    for name, own in plan.items():
        seeds[name] = seeds.get(name, set()) | set(own)
    whole = {
        "overrides": list(common),
        "seeds": in_order({name: sorted(own) for name, own in seeds.items()}),
        "commands": list(dict.fromkeys([*known.get("commands", []), command])),
    }
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(whole, indent=2) + "\n")


def to_do(out: Path, plan: Mapping[str, Sequence[int]], common: Sequence[str]) -> list[tuple[str, int]]:
    """The planned runs that have no summary yet; experiments of few seeds, which are the slow ones, first.

    Raises:
        ConfigError: a configuration is wrong, or a finished run was made with another one.
    """
    missing: list[tuple[str, int]] = []
    with Composer.open() as composer:
        for experiment in sorted(plan, key=lambda name: len(plan[name])):
            for seed in plan[experiment]:
                directory = out / experiment / str(seed)
                config = composer.run_config(overrides_of(experiment, seed, common))
                if (directory / "summary.json").exists():
                    _require_same(directory, config)
                else:
                    missing.append((experiment, seed))
    return missing


def _require_same(directory: Path, config: RunConfig) -> None:
    changed = [
        f"{key}: {old} → {new}"
        for key, old, new in differences(load_config(directory / "config.yaml"), config)
        if not key.startswith(_NOT_PART_OF_THE_RESULT)
    ]
    if changed:
        raise ConfigError(
            f"{directory} was made with another configuration ({'; '.join(changed)}); "
            "remove it, or take another folder with --out"
        )


def run_all(
    out: Path, runs: Sequence[tuple[str, int]], common: Sequence[str], *, jobs: int, threads: int
) -> None:
    """Run them, `jobs` at a time, saying how each one ended."""
    pool = ThreadPoolExecutor(jobs)
    try:
        started = {pool.submit(_run_in_process, out, *one, common, threads): one for one in runs}
        for number, future in enumerate(as_completed(started), 1):
            experiment, seed = started[future]
            future.result()
            (ended,) = read_runs(out, {experiment: [seed]})
            result = ended.result.replace("*", "")
            print(f"[{number} of {len(runs)}] {experiment} seed {seed}: {result}", flush=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _run_in_process(out: Path, experiment: str, seed: int, common: Sequence[str], threads: int) -> None:
    folder = out / experiment
    directory = folder / str(seed)
    folder.mkdir(parents=True, exist_ok=True)
    if directory.exists():
        if _is_being_written(directory):
            raise ConfigError(f"{directory} is being written by another process; wait for it or stop it")
        directory.rename(folder / f"{seed}.attempt_{1 + len(list(folder.glob(f'{seed}.attempt_*')))}")
    words = [sys.executable, "-m", "benchmarks.recovery", "--one", str(directory.absolute())]
    with (folder / f"{seed}.log").open("w") as log:
        subprocess.run(
            [*words, *overrides_of(experiment, seed, common)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            check=False,  # how it ended stands in its status.json
        )


def _is_being_written(directory: Path) -> bool:
    try:
        return RunDirectory.view(directory).is_being_written() is not False
    except RunDirectoryError:  # it was stopped before it wrote anything
        return False


def main() -> int:
    """Parse the command line, run what is missing, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "overrides", nargs="*", help="for every run, e.g. train.steps=20000; the page says so"
    )
    parser.add_argument("--rows", default=",".join(ROWS), help="experiments, separated by commas")
    parser.add_argument("--seeds", type=seeds_of, help="instead of each row's own, e.g. 0-4,7")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="of each run")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", type=Path, help=f"default {PAGE}, or <out>/{PAGE.name} with another --out")
    parser.add_argument("--table-only", action="store_true", help="write the page from what is there")
    parser.add_argument("--pictures", action="store_true", help="copy figures of solved runs and show them")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_intermixed_args()
    if arguments.one is not None:
        return guarded(lambda: run(compose(arguments.overrides), run_dir=arguments.one))[0]
    arguments.rows = arguments.rows.split(",")
    if arguments.seeds is None and (new := [name for name in arguments.rows if name not in ROWS]):
        parser.error(f"--seeds is needed for {', '.join(new)}; the table's own rows are {', '.join(ROWS)}")
    try:
        _make_table(arguments)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return ExitCode.bad_config
    except KeyboardInterrupt:
        print("stopped; give the same command again to go on", file=sys.stderr)
        return ExitCode.interrupted
    return ExitCode.ok


def _make_table(arguments: argparse.Namespace) -> None:
    out: Path = arguments.out
    path: Path = arguments.page or (PAGE if out == OUT else out / PAGE.name)
    if arguments.table_only:
        write_page(out, path, with_pictures=arguments.pictures)
        return
    common = [f"threads={arguments.threads}", *arguments.overrides]
    wanted = {name: list(arguments.seeds or ROWS[name]) for name in arguments.rows}
    missing = to_do(out, wanted, common)
    remember(out, wanted, common, shlex.join(["python", "-m", "benchmarks.recovery", *sys.argv[1:]]))
    print(f"{len(missing)} of {sum(map(len, wanted.values()))} runs to do", flush=True)
    try:
        run_all(out, missing, common, jobs=arguments.jobs, threads=arguments.threads)
    finally:
        write_page(out, path, with_pictures=arguments.pictures)


def write_page(out: Path, path: Path, *, with_pictures: bool = False) -> None:
    """Write the page of what is there: of all planned runs, or without a plan of the finished ones.

    Raises:
        ConfigError: there is neither.
    """
    plan: dict[str, Any] = {"overrides": [], "commands": [], "seeds": in_order(found(out))}
    if (out / PLAN).exists():
        plan = json.loads((out / PLAN).read_text())
    if not plan["seeds"]:
        raise ConfigError(f"{out} holds no {PLAN} and no finished run: there is nothing to make a table of")
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = read_runs(out, plan["seeds"])
    pictures = copy_pictures(runs, out, path.parent) if with_pictures else []
    text = page(runs, overrides=plan["overrides"], commands=plan["commands"], pictures=pictures)
    path.write_text(text, encoding="utf-8")
    print(path)


if __name__ == "__main__":
    sys.exit(main())
