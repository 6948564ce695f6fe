"""A training step on a language model, beside a plain implementation of the same step.

    python -m benchmarks.lm_step                       # lm_tiny and a Llama of 2 layers, on the CPU
    python -m benchmarks.lm_step --device cuda         # GPT-2-small and a Llama of 4 layers, 512 tokens
    python -m benchmarks.lm_step --write docs/performance.md

Milliseconds per step, samples (rows) per second, the share of the machine's matrix-product rate that is used
(MFU: FLOPs of our step over time and rate, the same for all ways) and the most bytes that tensors take at a
time within a step. The ways take turns in one process, start from the same weights and are compared first.
Exit code 1: their losses or gradients differ by more than 1e-4.
"""

import argparse
import dataclasses
import itertools
import math
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks import markdown, step_page
from benchmarks.lm_cases import LanguageModel, config
from benchmarks.plain_lm_step import PlainLanguageStep
from benchmarks.roofline import matmul_flops
from benchmarks.step_cases import Sample, Variant, differences, make, parts_of, wait_for
from benchmarks.step_memory import allocated_in_a_step

from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.environment import describe_environment

TITLE = "Language models"
WAYS = "compiled,blocks,eager"
"""`compiled`: what `spd-run` does, the step as a `whole` or its `blocks`; `+recomputed`: blocks run again."""
HEADER = ("model", "way", "ms per step", "rows/s", "MFU", "MiB in a step", "speed", "memory", "compiling, s")
_TOLERANCE = 1e-4
_SIDE = 2048  # of the square matrices that the machine is measured with


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and how much of it is decomposed on how much text."""

    name: str
    target: LanguageModel
    C: int
    length: int
    batch_size: int
    hidden: int

    def config(self, *, device: str, overrides: tuple[str, ...]) -> RunConfig:
        """The run whose steps are taken."""
        words = (f"train.batch_size={self.batch_size}", f"device={device}", *overrides)
        return config(self.target, C=self.C, length=self.length, hidden=self.hidden, overrides=words)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """An experiment as it is shipped, with further words."""

    name: str
    words: tuple[str, ...] = ()

    def config(self, *, device: str, overrides: tuple[str, ...]) -> RunConfig:
        """The run whose steps are taken."""
        return compose(["experiment=lm_tiny", f"device={device}", *self.words, *overrides])


CPU = (
    Preset(name="lm_tiny"),
    Preset(name="lm_tiny, layerwise", words=("loss=delta", "loss.divergence=kl")),
    Case(name="llama, 2 x 128", target=LanguageModel(), C=128, length=64, batch_size=16, hidden=64),
)
CUDA = (
    Case(
        name="GPT-2 small",
        target=LanguageModel(family="gpt2", layers=12, width=768, heads=12, vocabulary=50257),
        C=768,
        length=512,
        batch_size=2,
        hidden=256,
    ),
    Case(
        name="llama, 4 x 768",
        target=LanguageModel(layers=4, width=768, heads=12, vocabulary=32000),
        C=768,
        length=512,
        batch_size=4,
        hidden=256,
    ),
)


def measure(
    case: Case | Preset, ways: list[str], seconds: float, device: str, overrides: tuple[str, ...]
) -> list[list[str]]:
    """A row of the table for every way, the plain one last.

    Raises:
        ValueError: two ways differ in a loss or a gradient.
    """
    run = case.config(device=device, overrides=overrides)
    parts = parts_of(run, compiled=False)
    sample = parts.train_sampler()(0)
    plain = PlainLanguageStep(parts)
    variants = {way: made(way, run, sample) for way in ways}
    variants["plain"] = Variant(
        lambda given=None: plain.step(sample if given is None else given), plain.parameters, plain.device
    )
    begin = {"plain": 0.0}
    for way in ways:
        started = time.perf_counter()
        require_equal(way, variants[way], variants["plain"], sample)
        begin[way] = time.perf_counter() - started  # a step of each, the first one of this way
    uncompiled = made("eager", run, sample)
    flops = matmul_flops(lambda: uncompiled.step(sample))
    rate = rate_of_products(plain.device)
    times = in_turns(variants, seconds)
    memory = {way: allocated_in_a_step(variant) for way, variant in variants.items()}
    return [
        [
            case.name,
            way,
            f"{1000 * own:.0f}",
            f"{run.train.batch_size / own:.1f}",
            f"{flops / own / rate:.0%}",
            f"{memory[way] / 2**20:.0f}",
            f"{times['plain'] / own:.2f}",
            f"{memory[way] / memory['plain']:.2f}",
            f"{max(0.0, begin[way] - times['plain'] - own):.0f}",
        ]
        for way, own in times.items()
    ]


def made(way: str, run: RunConfig, sample: Sample) -> Variant:
    """One of `WAYS`."""
    how, *others = way.split("+")
    train = dataclasses.replace(
        run.train,
        checkpoint_activations="recomputed" in others,
        compile_blocks={"whole": False, "blocks": True}.get(how),
    )
    variant = make("eager" if how == "eager" else "compiled", dataclasses.replace(run, train=train))
    take = variant.step
    # All on one batch, for random numbers are not what is compared.
    variant.step = lambda given=None: take(sample if given is None else given)
    return variant


def require_equal(way: str, variant: Variant, reference: Variant, sample: Sample) -> None:
    """Raise ValueError if losses or gradients differ; the reference takes a step and is put back."""
    before = {name: p.detach().clone() for name, p in reference.parameters.items()}
    losses, gradients = differences(variant, reference, sample)
    with torch.no_grad():
        for name, p in reference.parameters.items():
            p.copy_(before[name])
    for what, found in (("loss", losses), ("gradient", gradients)):
        name = max(found, key=lambda key: math.inf if math.isnan(found[key]) else found[key])
        if not found[name] <= _TOLERANCE:
            raise ValueError(f"{way} and plain: the {what} {name} differs by {found[name]:.1e}")


def _clock(device: torch.device) -> Callable[[], float]:
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def rate_of_products(device: torch.device) -> float:
    """FLOPs per second of large square matrix products, at the best of several attempts."""
    a, b = (torch.ones(_SIDE, _SIDE, device=device) for _ in range(2))
    product = Variant(lambda sample=None: {"": a @ b}, {}, device)
    return 2 * _SIDE**3 / in_turns({"": product}, 1.0)[""]


def in_turns(variants: dict[str, Variant], seconds: float) -> dict[str, float]:
    """The least time of a step of each, one step after another in turns.

    With one thread on a CPU the time that the process computes, which others on the machine disturb less.
    """
    clock = _clock(next(iter(variants.values())).device)
    found = dict.fromkeys(variants, math.inf)
    end, rounds = time.perf_counter() + seconds, itertools.count()
    while next(rounds) < 3 or time.perf_counter() < end:
        for name, variant in variants.items():
            wait_for(variant.device)
            started = clock()
            variant.step()
            wait_for(variant.device)
            found[name] = min(found[name], clock() - started)
    return found


def section(rows: Sequence[Sequence[str]], environment: dict[str, Any], command: str) -> str:
    """The section of the page, with its heading."""
    return f"""## {TITLE}

{markdown.bullets([f"measured with `{command}`", step_page.machine({"environment": environment})])}

One training step on a language model, best of several rounds that take turns in one process. *plain*: the
published algorithm in uncompiled PyTorch (`benchmarks/plain_lm_step.py`): weight deltas formed, masked passes
one after the other through the whole model; all ways have its losses and gradients to {_TOLERANCE:g}. *MFU*:
FLOPs of our step over time and the rate of square matrix products, the same FLOPs for all ways. *speed* and
*memory*: over those of plain; memory is the most that the tensors made in a step take at a time. *compiling*:
seconds more that the first step takes, on this machine as busy as it was, with what the compiler had in its
cache. With one thread times are those that the process computes.

{markdown.table(HEADER, rows)}
"""


def main() -> int:
    """Parse the command line, measure, print; 1 if two ways differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the configuration, e.g. train.precision=bf16")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=30.0, help="per model")
    parser.add_argument("--cases", default="", metavar="NAME;…", help="of those of the device; default: all")
    parser.add_argument("--write", type=Path, help="put the table into this page, e.g. docs/performance.md")
    parser.add_argument("--ways", default=WAYS, metavar="WAY,…")
    arguments = parser.parse_intermixed_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave it out for the CPU's case")
    torch.set_num_threads(arguments.threads)
    environment = describe_environment(arguments.device)
    print(step_page.machine({"environment": environment}), flush=True)
    cases: tuple[Case | Preset, ...] = CUDA if arguments.device == "cuda" else CPU
    chosen = arguments.cases.split(";") if arguments.cases else [case.name for case in cases]
    if unknown := set(chosen) - {case.name for case in cases}:
        names = "; ".join(case.name for case in cases)
        parser.error(f"--cases: there is no {', '.join(sorted(unknown))}; there are {names}")
    rows: list[list[str]] = []
    for case in cases:
        if case.name not in chosen:
            continue
        try:
            own = measure(
                case,
                arguments.ways.split(","),
                arguments.seconds,
                arguments.device,
                tuple(arguments.overrides),
            )
        except ValueError as error:
            print(f"{case.name}: {error}")
            return 1
        rows += own
        print(*(" ".join(row) for row in own), sep="\n", flush=True)
    command = shlex.join(["python", "-m", "benchmarks.lm_step", *sys.argv[1:]])
    text = section(rows, environment, command)
    print(text)
    if arguments.write:
        markdown.write_section(arguments.write, TITLE, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
