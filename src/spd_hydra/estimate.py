"""What a run will take on this machine: memory, arithmetic and time of a step, before anything is trained."""

import dataclasses
import enum
import logging
import time
from collections.abc import Callable
from typing import Any

import torch

from spd_hydra import distributed
from spd_hydra.build import Parts
from spd_hydra.compiling import can_compile
from spd_hydra.config import Device, RunConfig
from spd_hydra.hardware import Gpu, Rates, peak_rates
from spd_hydra.launcher_config import Slurm
from spd_hydra.precision import Precision, products_in
from spd_hydra.simulation import Needs, planned_peak, simulate
from spd_hydra.trainer import compiles_blocks

logger = logging.getLogger(__name__)

_SECONDS = 0.25  # of one measurement
_SIDE = 1024  # of the square matrices that are multiplied
_COPIED = 2**26  # bytes that are copied, more than most caches hold


class Way(enum.StrEnum):
    """How a step is taken."""

    uncompiled = "an uncompiled step"
    whole = "a compiled step"
    blocks = "a step compiled block by block"


_LEAST_SECONDS = 0.01
_USED = {Way.whole: (0.29, 0.70), Way.blocks: (0.17, 0.53), Way.uncompiled: (0.14, 0.45)}
"""Least and most of the rate of matrix products that steps reached: MFU of models in docs/performance.md."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """What one process of a run needs per step.

    Attributes:
        needs: of one process, of all its replicas together, in an uncompiled step.
        way: how the run takes its steps.
        planned: most bytes that tensors take at a time in a step taken that way; None: not known.
        ranks: processes that share a batch.
        device: where a step was simulated.
        rates: of that device; None where this machine does not have the one that the run will use.
        fp32: FLOPs per second of its float32 products; None: those of `rates`.
        gpu: the one that rates are the data sheet's of; None: they were measured here.
        reads_tokens: whether the target is a model of text, as those are whose steps were measured.
    """

    needs: Needs
    way: Way
    planned: int | None
    ranks: int
    device: torch.device
    rates: Rates | None
    fp32: float | None = None
    gpu: Gpu | None = None
    reads_tokens: bool = False

    @property
    def peak(self) -> tuple[int, Way]:
        """Most bytes that tensors take at a time, and in which step: the run's own, where that is known."""
        if self.planned is None:
            return self.needs.peak, Way.uncompiled
        return self.planned, self.way

    @property
    def seconds(self) -> float | None:
        """FLOPs over their rate, or bytes that have to be moved over theirs, if that takes longer.

        A lower bound: random numbers, masks and activation functions count nothing, and everything else is
        taken to run at the rate of a large matrix product.
        """
        if self.rates is None:
            return None
        return max(self.needs.flops / self.rates.matmul, self.needs.moved / self.rates.copy)

    @property
    def expected(self) -> tuple[float, float] | None:
        """Least and most seconds that a step of a model of text should take, by what others of its kind took.

        The least with products at the rate of the run's precision, the most at that of float32, in which
        those others were measured. Nothing is said of toys, most of whose time is spent on the activations of
        small networks, of steps of a few milliseconds, most of which is spent around the arithmetic, nor of
        steps that take longer to move their bytes.
        """
        if self.rates is None or self.seconds is None or not self.reads_tokens:
            return None
        least, most = _USED[self.way]
        low = max(self.seconds, self.needs.flops / self.rates.matmul / most)
        high = self.needs.flops / (self.fp32 or self.rates.matmul) / least
        return (low, high) if _LEAST_SECONDS <= low < high else None

    def lines(self) -> list[str]:
        """What people read."""
        needs, (peak, way) = self.needs, self.peak
        each = f" of each of {self.ranks} ranks" if self.ranks > 1 else ""
        other = "" if way is self.way else f"; not known of {self.way}, as the run takes it"
        found = [
            f"parameters: {needs.trained:,} trained, {needs.frozen:,} frozen",
            f"memory{each}: {_bytes(needs.resident)} for parameters, gradients and AdamW's moments, "
            f"{_bytes(peak)} at the peak of {way}{other}",
            f"arithmetic{each}: {_number(needs.flops)}FLOP per step in matrix products",
        ]
        if self.rates is None or self.seconds is None:
            return [
                *found,
                "time: this machine has no GPU to measure; name one, e.g. check.device=H100, or run "
                "task=check there",
            ]
        place = f"this {self.device.type}" if self.gpu is None else f"an {self.gpu.value} by its data sheet"
        found.append(
            f"time: at least {_milliseconds(self.seconds, 3)} per step on {place} "
            f"({_number(self.rates.matmul)}FLOP/s, {_number(self.rates.copy)}B/s), if everything ran as fast "
            "as matrix products"
        )
        if self.expected is not None:
            low, high = (_milliseconds(seconds, 2) for seconds in self.expected)
            least, most = _USED[self.way]
            rate = "that rate" if self.fp32 is None else "the rate of float32 to that rate"
            found.append(
                f"time: {low} to {high} per step, from the {least:.0%} to {most:.0%} of {rate} at which "
                f"{self.way} of small language models ran on two CPUs (docs/performance.md)"
            )
        return found

    def facts(self) -> dict[str, Any]:
        """The numbers, by name."""
        needs, (peak, way) = self.needs, self.peak
        return {
            "trainable_parameters": needs.trained,
            "frozen_parameters": needs.frozen,
            "resident_bytes": needs.resident,
            "peak_bytes": peak,
            "peak_is_of": way.value,
            "uncompiled_peak_bytes": needs.peak,
            "flops_per_step": needs.flops,
            "least_seconds_per_step": self.seconds,
            "expected_seconds_per_step": self.expected,
        }


def estimate(config: RunConfig, parts: Parts) -> Estimate:
    """What a run of this configuration needs; nothing is trained, a device is measured for half a second.

    Args:
        config: the run's.
        parts: from `preflight`.
    """
    here = torch.cuda.is_available()
    elsewhere = isinstance(config.launcher, Slurm) and bool(config.launcher.gpus) and not here
    wants_gpu = config.device is Device.cuda or (config.device is Device.auto and here)
    device = torch.device("cuda" if wants_gpu and here else "cpu")
    # A process that was started as a rank has no launcher.
    ranks = max(config.launcher.ranks, distributed.started_with())
    rows = -(-config.train.batch_size // ranks)
    replicas = config.train.replicas
    needs = simulate(parts, rows=rows, device=device, ranks=ranks, shard=config.train.shard).times(replicas)
    way = _way(parts, device)
    planned: int | None = needs.peak
    if way is not Way.uncompiled:
        try:
            one = planned_peak(parts, rows=rows, device=device, ranks=ranks, shard=config.train.shard)
            planned = replicas * one
        except Exception as error:  # whatever a compiler may say, of this version or of another
            logger.warning("the peak memory of %s is not known: %s", way, str(error).partition("\n")[0])
            planned = None
    gpu, precision = config.check.device, config.train.precision
    known: Rates | None = None
    fp32: Rates | None = None
    if gpu is not None:
        known, fp32 = peak_rates(gpu, precision), peak_rates(gpu, Precision.fp32)
    elif not elsewhere or config.device is Device.cpu:
        known = measure(device, precision)
        fp32 = known if precision is Precision.fp32 else measure(device, Precision.fp32)
    return Estimate(
        needs=needs,
        way=way,
        planned=planned,
        ranks=ranks,
        device=device,
        rates=known,
        fp32=None if fp32 is None or precision is Precision.fp32 else fp32.matmul,
        gpu=gpu,
        reads_tokens=parts.reads_tokens,
    )


def _way(parts: Parts, device: torch.device) -> Way:
    training = parts.config.train
    if not (training.compile and can_compile(device.type)):
        return Way.uncompiled
    return Way.blocks if compiles_blocks(parts.objective, training) else Way.whole


def measure(device: torch.device, precision: Precision) -> Rates:
    """Rates of a device, at the better of several attempts in a quarter of a second each."""
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    a, b = (torch.ones(_SIDE, _SIDE, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(_COPIED // 4, device=device)
    target = torch.zeros_like(source)
    with products_in(precision):
        seconds = _least_seconds(lambda: torch.mm(a, b), device)
    return Rates(
        matmul=2 * _SIDE**3 / seconds,
        copy=2 * _COPIED / _least_seconds(lambda: target.copy_(source), device),
    )


def _least_seconds(run: Callable[[], object], device: torch.device) -> float:
    wait = torch.get_device_module(device).synchronize
    run()
    found: list[float] = []
    while not found or sum(found) < _SECONDS:
        wait()
        started = time.perf_counter()
        run()
        wait()
        found.append(time.perf_counter() - started)
    return min(found)


def _bytes(number: int) -> str:
    """In the largest unit of which there is one: KiB, MiB, GiB."""
    unit = next((n for n, size in (("GiB", 2**30), ("MiB", 2**20)) if number >= size), "KiB")
    return f"{number / {'GiB': 2**30, 'MiB': 2**20, 'KiB': 2**10}[unit]:.1f} {unit}"


def _milliseconds(seconds: float, digits: int) -> str:
    number = 1000 * seconds
    return f"{number:.{digits}g} ms" if number < 100 else f"{number:,.0f} ms"


def _number(number: float) -> str:
    """With a prefix: 1.2 G, 3.4 T."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "
