"""The peak memory that `task=check` predicts for a step, beside what one takes.

    python -m benchmarks.predicted_memory
    python -m benchmarks.predicted_memory --cases "tms_5-2;lm_tiny" --write docs/performance.md

Both count parameters, target, gradients, AdamW's moments, batch and random numbers, and what tensors take at
a time beside them within a step. A run's first step is compiled and not counted. CPU only.
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from benchmarks import lm_step, markdown, step_page
from benchmarks.step_cases import Case, Variant, trainer_of
from benchmarks.step_memory import allocated_in_a_step

from spd_hydra.config import RunConfig
from spd_hydra.environment import describe_environment
from spd_hydra.estimate import Estimate, estimate
from spd_hydra.preflight import preflight

TITLE = "Predicted memory"
HEADER = ("run", "way", "predicted, MiB", "measured, MiB", "ratio", "uncompiled, MiB")
_STEPS = 2  # before the one that is measured: the first compiles and makes gradients and moments
_QUIET = "train.log_every=1000000"

_TOYS = ("tms_5-2", "tms_40-10", "tms_40-10@4096", "resid_mlp1", "resid_mlp2")
_WAYS = {"whole": "false", "blocks": "true"}

CASES: dict[str, tuple[Case | lm_step.Case | lm_step.Preset, tuple[str, ...]]] = {
    **{name: (Case.read(name), ()) for name in _TOYS},
    **{
        f"{case.name}, {way}": (case, (f"train.compile_blocks={blocks}",))
        for case in lm_step.CPU
        for way, blocks in _WAYS.items()
    },
}


@dataclasses.dataclass(frozen=True)
class Peak:
    """Of one run.

    Attributes:
        predicted: what `task=check` says.
        measured: bytes.
    """

    predicted: Estimate
    measured: int

    @property
    def ratio(self) -> float:
        """Predicted over measured."""
        return self.predicted.peak[0] / self.measured


def config_of(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """The run of a name in `CASES`."""
    case, words = CASES[name]
    return case.config(device="cpu", overrides=(_QUIET, *words, *overrides))


def compare(config: RunConfig) -> Peak:
    """Predict the peak of a step, then take some and measure one."""
    predicted = estimate(config, preflight(config))
    trainer = trainer_of(config)
    variant = Variant(lambda sample=None: trainer.train_step().terms, {}, torch.device("cpu"))
    for _ in range(_STEPS):
        variant.step()
    parameters = sum(p.nbytes for p in trainer.model.parameters())
    trained = sum(p.nbytes for p in trainer.updates.components + trainer.updates.ci_fn)
    # Gradients of the step before are there until a step that is compiled as a whole returns its own;
    # otherwise they are dropped first, which the profiler does not see.
    before = trained if trainer.loss_and_gradients.is_compiled else 0
    return Peak(predicted, parameters + 2 * trained + before + allocated_in_a_step(variant))


def row(name: str, peak: Peak) -> list[str]:
    """Of the table."""
    predicted, way = peak.predicted.peak
    sizes = [predicted, peak.measured, peak.predicted.needs.peak]
    predicted_size, measured, uncompiled = (f"{size / 2**20:.1f}" for size in sizes)
    return [name, way.value, predicted_size, measured, f"{peak.ratio:.2f}", uncompiled]


def section(rows: Sequence[Sequence[str]], environment: dict[str, Any], command: str) -> str:
    """The section of the page, with its heading."""
    return f"""## {TITLE}

{markdown.bullets([f"measured with `{command}`", step_page.machine({"environment": environment})])}

The most memory of tensors at a time in a step, predicted by `task=check` and as torch's profiler sees it,
parameters, target, gradients and moments included.

{markdown.table(HEADER, rows)}
"""


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of the configuration, e.g. train.precision=bf16")
    parser.add_argument("--cases", default=";".join(CASES), metavar="NAME;…")
    parser.add_argument("--write", type=Path, help="put the table into this page, e.g. docs/performance.md")
    arguments = parser.parse_intermixed_args()
    chosen = arguments.cases.split(";")
    if unknown := set(chosen) - CASES.keys():
        parser.error(f"--cases: there is no {', '.join(sorted(unknown))}; there are {'; '.join(CASES)}")
    environment = describe_environment("cpu")
    rows: list[list[str]] = []
    for name in chosen:
        rows.append(row(name, compare(config_of(name, arguments.overrides))))
        print(" | ".join(rows[-1]), flush=True)
    command = shlex.join(["python", "-m", "benchmarks.predicted_memory", *sys.argv[1:]])
    text = section(rows, environment, command)
    print(text)
    if arguments.write:
        markdown.write_section(arguments.write, TITLE, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
