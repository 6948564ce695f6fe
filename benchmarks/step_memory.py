"""Memory of one training step: what is allocated in it, and how large a process that does nothing else grows.

    python -m benchmarks.step_memory compiled tms_40-10@4096 2 cpu

prints the numbers of one variant (with 2 threads, on the CPU) as JSON; `step_time.py` calls it once per
variant. On a GPU all numbers are those of the GPU's memory, the process's what torch reserved there.
"""

import dataclasses
import itertools
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.step_cases import Case, Variant, make, wait_for

from spd_hydra.build import untrained_target
from spd_hydra.config import RunConfig
from spd_hydra.decomposition.sites import find_sites

ROOT = Path(__file__).resolve().parents[1]
_STEPS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes.

    Attributes:
        process: most that the whole process held, compiler included.
        before: most that it held before the first step.
        allocated: most that the tensors made within one step take at a time.
        largest: the largest tensor made within one step.
    """

    process: int
    before: int
    allocated: int
    largest: int


def measure(variant: Variant) -> Memory:
    """Take a few steps, then one under the eyes of torch's memory profiler."""
    before = _peak(variant.device)
    for _ in range(_STEPS):
        variant.step()
    process = _peak(variant.device)
    sizes = _sizes_in_a_step(variant)
    allocated = _allocated_on_gpu(variant) if variant.device.type == "cuda" else _most(sizes)
    return Memory(process=process, before=before, allocated=allocated, largest=max(sizes, default=0))


def allocated_in_a_step(variant: Variant) -> int:
    """Most bytes that the tensors made within one step take at a time."""
    if variant.device.type == "cuda":
        return _allocated_on_gpu(variant)
    return _most(_sizes_in_a_step(variant))


def _most(sizes: Sequence[int]) -> int:
    return max(itertools.accumulate(sizes), default=0)


def _sizes_in_a_step(variant: Variant) -> list[int]:
    """Bytes of every tensor made (positive) and freed (negative) on the step's device, in order."""
    cpu = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[cpu], profile_memory=True) as watched:
        variant.step()
        wait_for(variant.device)
    assert watched.profiler is not None, "the profiler ran"
    events = [
        event
        for event in watched.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name.lower() == variant.device.type
    ]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def _allocated_on_gpu(variant: Variant) -> int:
    wait_for(variant.device)
    torch.cuda.reset_peak_memory_stats(variant.device)
    before = torch.cuda.memory_allocated(variant.device)
    variant.step()
    wait_for(variant.device)
    return torch.cuda.max_memory_allocated(variant.device) - before


def measure_in_fresh_process(
    name: str, case: Case, threads: int, device: str, overrides: Sequence[str]
) -> Memory:
    """The memory of one variant.

    Raises:
        RuntimeError: the process failed.
    """
    words = [sys.executable, "-m", "benchmarks.step_memory", name, str(case), str(threads)]
    words += [device, *overrides]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words[1:])} ended with {done.returncode}:\n{done.stderr}")
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def hidden_bytes(config: RunConfig) -> int:
    """Size of the `[batch, C, hidden]` tensor of plain private MLPs, at the widest site; else 0."""
    hidden = getattr(config.ci_fn, "hidden", None)
    if not isinstance(hidden, int):
        return 0
    sites = find_sites(untrained_target(config), config.decomposition.sites)
    return 4 * config.train.batch_size * max(entry.subcomponents for entry in sites.values()) * hidden


def _peak(device: torch.device) -> int:
    """Most memory that this process has held; getrusage would count that of its parent at the fork, too."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        return 1024 * int(lines["VmHWM"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def main() -> None:
    """Measure the variant that the command line names."""
    name, case, threads, device, *overrides = sys.argv[1:]
    torch.set_num_threads(int(threads))
    variant = make(name, Case.read(case).config(overrides, device))
    print(json.dumps(dataclasses.asdict(measure(variant))))


if __name__ == "__main__":
    main()
