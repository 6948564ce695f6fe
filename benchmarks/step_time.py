"""Milliseconds per training step, beside a plain implementation of the same step.

    python -m benchmarks.step_time --threads 1 --write docs/performance.md
    python -m benchmarks.step_time --device cuda --memory all

Data, loss, gradients and AdamW's update count. The three ways, on a GPU four, take turns in one process and
start from the same weights; losses and gradients are compared first, with those of the plain implementation
in float64. The machine itself is measured too, for the least time that a step can take (`roofline.py`).
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
from benchmarks import (
    lm_step,
    markdown,
    predicted_memory,
    replica_time,
    roofline,
    step_page,
    time_to_solved,
)
from benchmarks.step_cases import (
    REFERENCE,
    TOLERANCE,
    VARIANTS,
    Case,
    Variant,
    differences,
    example,
    make,
    variants_on,
    wait_for,
)
from benchmarks.step_memory import hidden_bytes, measure_in_fresh_process

from spd_hydra.build import device_of
from spd_hydra.compiling import can_compile
from spd_hydra.environment import describe_environment

CASES = (
    "tms_5-2@4096,tms_5-2,tms_5-2-id,tms_40-10@4096,tms_40-10,tms_40-10-id,"
    "resid_mlp1@2048,resid_mlp1,resid_mlp2,resid_mlp3"
)
_ROUND_SECONDS = 0.2  # of one variant, before the next one's turn
_FEWEST_ROUNDS = 3


def time_case(
    case: Case, seconds: float, overrides: Sequence[str] = (), device: str = "cpu"
) -> dict[str, Any]:
    """Compare the variants' numbers, then their times.

    Args:
        case: the preset.
        seconds: how long to measure, all variants together, compilation not included.
        overrides: of the configuration.
        device: cpu, cuda or auto.
    """
    config = case.config(overrides, device)
    sample = example(config)
    names = variants_on(device_of(config))
    variants = {name: make(name, config) for name in names}
    agreement = {}
    for name in names[:-1]:
        started = time.perf_counter()
        losses, gradients = differences(variants[name], make(REFERENCE, config), sample)
        agreement[name] = {
            "losses": losses, "gradients": gradients, "first_step_seconds": time.perf_counter() - started
        }  # fmt: skip
    work = {name: roofline.work_of(config, variants[name], sample) for name in ("eager", "plain")}
    times = take_turns(variants, seconds)
    shape = roofline.largest_shape(config)
    return {
        "case": str(case),
        "batch_size": config.train.batch_size,
        "C": {name: site.C for name, site in config.decomposition.sites.items()},
        "agreement": agreement,
        "ms": {
            name: {"best": min(own), "median": statistics.median(own), "rounds": len(own)}
            for name, own in times.items()
        },
        "work": {name: dataclasses.asdict(own) for name, own in work.items()},
        "shape": {"m_k_n": shape, "matmul": roofline.matmul_rate(variants["plain"].device, *shape)},
    }


def take_turns(variants: dict[str, Variant], seconds: float) -> dict[str, list[float]]:
    """Milliseconds per step in each round, the variants one after another within a round."""
    steps = {name: _steps_per_round(variant) for name, variant in variants.items()}
    found: dict[str, list[float]] = {name: [] for name in variants}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(found[VARIANTS[0]]) < _FEWEST_ROUNDS:
        for name, variant in variants.items():
            found[name].append(1000 * _seconds(variant, steps[name]) / steps[name])
    return found


def _steps_per_round(variant: Variant) -> int:
    for _ in range(variant.first_steps):  # its sampler may have to be compiled
        variant.step()
    return max(1, round(_ROUND_SECONDS / _seconds(variant, 1)))


def _seconds(variant: Variant, steps: int) -> float:
    wait_for(variant.device)
    started = time.perf_counter()
    for _ in range(steps):
        variant.step()
    wait_for(variant.device)
    return time.perf_counter() - started


def memory_of(case: Case, threads: int, overrides: Sequence[str] = (), device: str = "cpu") -> dict[str, Any]:
    """Memory of each variant in a process of its own, beside the tensor that none of them need keep."""
    found = {name: measure_in_fresh_process(name, case, threads, device, overrides) for name in VARIANTS}
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
        compiled = can_compile(result["environment"].get("device", "cpu"))
        if compiled and 0 < memory["hidden_bytes"] <= largest:
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
    parser.add_argument(
        "--memory", default="tms_40-10@4096,resid_mlp1,resid_mlp2", metavar="NAME[@BATCH],…|all"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "auto"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=15.0, help="per experiment")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--write", type=Path, help="write a page to this file, e.g. docs/performance.md")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    memory = arguments.experiments if arguments.memory == "all" else arguments.memory
    device = device_of(Case("tms_5-2").config(device=arguments.device))
    result: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "benchmarks.step_time", *sys.argv[1:]]),
        "environment": describe_environment(device.type),
        "rates": dataclasses.asdict(roofline.measure_rates(device)),
        "cases": [],
        "memory": [],
    }
    print(step_page.machine(result), step_page.rates_line(result), sep="\n", flush=True)
    for case in _cases(arguments.experiments):
        result["cases"].append(time_case(case, arguments.seconds, arguments.overrides, device.type))
        print(step_page.case_line(result["cases"][-1]), flush=True)
    for case in _cases(memory):
        result["memory"].append(memory_of(case, arguments.threads, arguments.overrides, device.type))
    result["complaints"] = complaints(result)
    print(step_page.tables(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.write:
        before = arguments.write.read_text(encoding="utf-8") if arguments.write.exists() else ""
        arguments.write.write_text(with_others(step_page.page(result), before), encoding="utf-8")
    return 1 if result["complaints"] else 0


def with_others(page: str, before: str) -> str:
    """The page with the sections that other programs wrote into it before."""
    for title in (replica_time.TITLE, time_to_solved.TITLE, lm_step.TITLE, predicted_memory.TITLE):
        page = markdown.with_section(page, title, markdown.section(before, title))
    return page


def _cases(text: str) -> list[Case]:
    return [Case.read(name) for name in text.split(",") if name]


if __name__ == "__main__":
    sys.exit(main())
