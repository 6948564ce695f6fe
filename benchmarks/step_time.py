"""Milliseconds per training step, beside a plain implementation of the same step.

    python -m benchmarks.step_time --threads 1 --write docs/performance.md

Data, loss, gradients and AdamW's update count. The three ways take turns in one process and start from the
same weights; losses and gradients are compared first, with those of the plain implementation in float64.
Exit code 1: they differ by more than 1e-5.
"""

import argparse
import dataclasses
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks import step_page
from benchmarks.step_cases import REFERENCE, TOLERANCE, VARIANTS, Case, Variant, differences, example, make
from benchmarks.step_memory import hidden_bytes, measure_in_fresh_process

from spd_hydra.compiling import can_compile
from spd_hydra.environment import describe_environment

CASES = "tms_5-2@4096,tms_5-2,tms_40-10@4096,tms_40-10,resid_mlp1@2048,resid_mlp1"
_ROUND_SECONDS = 0.2  # of one variant, before the next one's turn
_FEWEST_ROUNDS = 3


def time_case(case: Case, seconds: float, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compare the variants' numbers, then their times.

    Args:
        case: the preset.
        seconds: how long to measure, all variants together, compilation not included.
        overrides: of the configuration.
    """
    config = case.config(overrides)
    sample = example(config)
    variants = {name: make(name, config) for name in VARIANTS}
    agreement = {}
    for name in VARIANTS[:-1]:
        started = time.perf_counter()
        losses, gradients = differences(variants[name], make(REFERENCE, config), sample)
        agreement[name] = {
            "losses": losses, "gradients": gradients, "first_step_seconds": time.perf_counter() - started
        }  # fmt: skip
    times = take_turns(variants, seconds)
    return {
        "case": str(case),
        "batch_size": config.train.batch_size,
        "C": {name: site.C for name, site in config.decomposition.sites.items()},
        "agreement": agreement,
        "ms": {
            name: {"best": min(own), "median": statistics.median(own), "rounds": len(own)}
            for name, own in times.items()
        },
    }


def take_turns(variants: dict[str, Variant], seconds: float) -> dict[str, list[float]]:
    """Milliseconds per step in each round, the variants one after another within a round."""
    steps = {name: _steps_per_round(variant) for name, variant in variants.items()}
    found: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[VARIANTS[0]]) < _FEWEST_ROUNDS:
        for name, variant in variants.items():
            started = time.perf_counter()
            for _ in range(steps[name]):
                variant.step()
            found[name].append(1000 * (time.perf_counter() - started) / steps[name])
    return found


def _steps_per_round(variant: Variant) -> int:
    variant.step()  # its sampler may have to be compiled
    started = time.perf_counter()
    variant.step()
    return max(1, round(_ROUND_SECONDS / (time.perf_counter() - started)))


def memory_of(case: Case, threads: int, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Memory of each variant in a process of its own, beside the tensor that none of them need keep."""
    found = {name: measure_in_fresh_process(name, case, threads, overrides) for name in VARIANTS}
    return {
        "case": str(case),
        "hidden_bytes": hidden_bytes(case.config(overrides)),
        "bytes": {name: dataclasses.asdict(memory) for name, memory in found.items()},
    }


def complaints(result: dict[str, Any]) -> list[str]:
    """What is wrong with the measured numbers: variants that disagree, a tensor that should not exist."""
    found = []
    for case in result["cases"]:
        for name, agreement in case["agreement"].items():
            for what in ("losses", "gradients"):
                worst = max(agreement[what], key=lambda key: _size(agreement[what][key]))
                most = agreement[what][worst]
                if not most <= TOLERANCE:
                    found.append(
                        f"{case['case']}: {name} and {REFERENCE}: {what} differ by {most:.1e} in {worst}, "
                        f"more than {TOLERANCE:g}"
                    )
    for memory in result["memory"]:
        largest = memory["bytes"]["compiled"]["largest"]
        if can_compile("cpu") and largest >= memory["hidden_bytes"]:
            found.append(
                f"{memory['case']}: compiled makes a tensor as large as [batch, C, hidden]: {largest} bytes"
            )
    return found


def _size(value: float) -> float:
    return math.inf if math.isnan(value) else value


def main() -> int:
    """Parse the command line, measure, print; 1 if the variants disagree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the configuration, e.g. ci_fn.hidden=32")
    parser.add_argument("--experiments", default=CASES, metavar="NAME[@BATCH],…")
    parser.add_argument("--memory", default="tms_40-10@4096", metavar="NAME[@BATCH],…")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15.0, help="per experiment")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--write", type=Path, help="write a page to this file, e.g. docs/performance.md")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.step_time", *sys.argv[1:]]),
        "environment": describe_environment(),
        "cases": [],
        "memory": [],
    }
    print(step_page.machine(result["environment"]), flush=True)
    for text in filter(None, arguments.experiments.split(",")):
        result["cases"].append(time_case(Case.read(text), arguments.seconds, arguments.overrides))
        print(step_page.case_line(result["cases"][-1]), flush=True)
    for text in filter(None, arguments.memory.split(",")):
        result["memory"].append(memory_of(Case.read(text), arguments.threads, arguments.overrides))
    result["complaints"] = complaints(result)
    print(step_page.tables(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.write:
        arguments.write.write_text(step_page.page(result))
    return 1 if result["complaints"] else 0


if __name__ == "__main__":
    sys.exit(main())
