"""Milliseconds per training step of several replicas at once, beside one.

    python -m benchmarks.replica_time --replicas 1,4,16 --write docs/performance.md

Data, loss, gradients and AdamW's update, compiled, for untrained targets; on a GPU replayed as CUDA graphs,
or with `train.cuda_graphs=false` launched kernel by kernel. The counts take turns in one process.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks import markdown
from benchmarks.step_cases import Case, trainer_of, wait_for
from benchmarks.step_page import machine

from spd_hydra.build import device_of
from spd_hydra.environment import describe_environment
from spd_hydra.graph import REHEARSALS
from spd_hydra.replicas import Replicas

TITLE = "Replicas"
_ROUNDS = 5
_ROUND_SECONDS = 0.5


def stepper(case: Case, replicas: int, overrides: Sequence[str], device: str) -> Callable[[], Any]:
    """A function that takes one step of so many replicas, of consecutive seeds."""
    configs = [case.config([*overrides, f"seed={seed}"], device) for seed in range(replicas)]
    trainers = [trainer_of(config) for config in configs]
    if replicas == 1:
        return trainers[0].train_step
    group = Replicas(trainers)
    group.begin()
    return group.train_step


def time_case(
    case: Case, counts: Sequence[int], overrides: Sequence[str], device: torch.device
) -> dict[int, float]:
    """Milliseconds per step by number of replicas: the best round of each, which take turns."""
    steps = {count: stepper(case, count, overrides, device.type) for count in counts}
    lengths = {}
    for count, step in steps.items():
        _seconds(step, REHEARSALS + 2 if device.type == "cuda" else 2, device)  # compiles, and records
        lengths[count] = max(1, round(_ROUND_SECONDS / _seconds(step, 1, device)))
    found: dict[int, list[float]] = {count: [] for count in counts}
    for _ in range(_ROUNDS):
        for count, step in steps.items():
            found[count].append(1000 * _seconds(step, lengths[count], device) / lengths[count])
    return {count: min(own) for count, own in found.items()}


def _seconds(step: Callable[[], Any], number: int, device: torch.device) -> float:
    wait_for(device)
    started = time.perf_counter()
    for _ in range(number):
        step()
    wait_for(device)
    return time.perf_counter() - started


def rows(times: dict[str, dict[int, float]]) -> list[list[str]]:
    """The table: for each count the time of a step, over that of one replica, and per replica."""
    return [
        [case, str(count), f"{ms:.2f}", f"{ms / own[min(own)]:.2f}", f"{ms / count:.3f}"]
        for case, own in times.items()
        for count, ms in own.items()
    ]


def section(times: dict[str, dict[int, float]], environment: dict[str, Any], command: str) -> str:
    """The section of the page, with its heading."""
    header = ["experiment", "replicas", "ms per step", "over the fewest", "ms per step and replica"]
    return f"""## {TITLE}

{markdown.bullets([f"measured with `{command}`", machine({"environment": environment})])}

One training step of `train.replicas` decompositions, compiled; best of {_ROUNDS} rounds that take turns.

{markdown.table(header, rows(times))}
"""


def main() -> None:
    """Parse the command line, measure, print, write the section into the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the configuration, e.g. train.batch_size=64")
    parser.add_argument("--experiments", default="tms_5-2,tms_40-10", metavar="NAME[@BATCH],…")
    parser.add_argument("--replicas", default="1,4,16", metavar="R,…")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda", "auto"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", type=Path, help="put the table into this page, e.g. docs/performance.md")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    device = device_of(Case("tms_5-2").config(device=arguments.device))
    counts = sorted({int(text) for text in arguments.replicas.split(",")})
    times = {
        text: time_case(Case.read(text), counts, arguments.overrides, device)
        for text in arguments.experiments.split(",")
    }
    command = shlex.join(["python", "-m", "benchmarks.replica_time", *sys.argv[1:]])
    text = section(times, describe_environment(device.type), command)
    print(text)
    if arguments.write:
        markdown.write_section(arguments.write, TITLE, text)


if __name__ == "__main__":
    main()
