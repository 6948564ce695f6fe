"""The least time that a step can take: what it has to compute and to move, over what the machine can.

    bound = max(matmul FLOPs / matmul rate + activations / activation rate, bytes / copy rate)

Matrix products and activations add up, as the same units compute both, one after the other; memory is moved
meanwhile. Random numbers, masks and the optimiser's arithmetic are taken to cost nothing, and everything
but the bytes counted here to stay in the cache: so the bound is below what can be reached.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from benchmarks.step_cases import Sample, Variant, parts_of, wait_for
from jaxtyping import Float
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from spd_hydra.compiling import Kernel, can_compile
from spd_hydra.config import RunConfig
from spd_hydra.decomposition.decomposed_model import DecomposedModel

_MIB = 2**20
_CACHE_COPY = 8 * _MIB
_LARGEST_COPY = 2048 * _MIB
_SECONDS = 0.3  # of one measurement
_FEWEST = 3
_PASSES = 2  # every hidden unit is needed in the forward pass and, for the gradients, in the backward pass
_PARAMETER_ACCESSES = 8  # gradient written; gradient, parameter and two moments read, the last three written


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What one step has to do.

    Attributes:
        matmul_flops: of its matrix products, 2·m·k·n each.
        activations: evaluations of hidden units of the causal-importance functions.
        bytes: that have to be moved at least.
    """

    matmul_flops: int
    activations: int
    bytes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rates:
    """What the machine does per second, with the threads that the steps have.

    Attributes:
        matmul: float32 FLOPs in the product of two square matrices, at the better of two sizes.
        activations: GELUs, each with one exponential and one division, in a compiled loop.
        copy_memory: bytes read and written when a tensor is copied that is far larger than the cache.
        copy_cache: the same for one that fits.
        copied: size of the large tensor in bytes.
    """

    matmul: float
    activations: float
    copy_memory: float
    copy_cache: float
    copied: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bound:
    """Milliseconds that a step takes at least, and what they are made of."""

    matmul: float
    activations: float
    memory: float

    @property
    def total(self) -> float:
        """Matrix products and activations one after the other, or memory if that takes longer."""
        return max(self.matmul + self.activations, self.memory)


def bound(work: Work, rates: Rates) -> Bound:
    """The least time of this work. Memory counts at the better of the two copy rates."""
    return Bound(
        matmul=1000 * work.matmul_flops / rates.matmul,
        activations=1000 * work.activations / rates.activations,
        memory=1000 * work.bytes / max(rates.copy_memory, rates.copy_cache),
    )


def work_of(config: RunConfig, variant: Variant, sample: Sample) -> Work:
    """What a step of this configuration has to do; the variant, which must not be compiled, takes one."""
    model = parts_of(config, compiled=False).model
    n_parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Work(
        matmul_flops=matmul_flops(lambda: variant.step(sample)),
        activations=activations(model, config.train.batch_size),
        bytes=bytes_moved(n_parameters, sum(tensor.numel() for tensor in sample)),
    )


def matmul_flops(run: Callable[[], object]) -> int:
    """FLOPs of all matrix products in a call, 2·m·k·n for `[m, k] @ [k, n]`, backward passes included."""
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return int(counter.get_total_flops())


def activations(model: DecomposedModel, positions: int) -> int:
    """Hidden units evaluated in a step: positions × hidden units × 2 passes, over all sites.

    Private MLPs have C × hidden units, one that a site's subcomponents share the sum of its widths.
    """
    units = sum(_hidden_units(site) for site in model.ci_fn.get_submodule("sites").children())
    return _PASSES * positions * units


def _hidden_units(site: torch.nn.Module) -> int:
    if isinstance(site, torch.nn.Sequential):
        *hidden, _ = (layer for layer in site if isinstance(layer, torch.nn.Linear))
        return sum(layer.out_features for layer in hidden)
    return site.get_parameter("b_in").numel()


def bytes_moved(n_parameters: int, n_inputs: int) -> int:
    """Bytes that a step moves at least, 4 per float32 number.

    Every parameter's gradient is written, then AdamW reads gradient, parameter and two moments and writes the
    last three: 8 per parameter. Batch and random numbers are written once and read once: 2 per number.
    """
    return 4 * (_PARAMETER_ACCESSES * n_parameters + 2 * n_inputs)


def measure_rates(device: torch.device, sizes: Sequence[int] = (512, 2048)) -> Rates:
    """Measure the machine, in a few seconds; products of matrices of these sizes."""
    copied = min(max(256 * _MIB, 4 * last_level_cache(device)), _LARGEST_COPY)
    return Rates(
        matmul=max(matmul_rate(device, size, size, size) for size in sizes),
        activations=_activation_rate(device),
        copy_memory=_copy_rate(device, copied),
        copy_cache=_copy_rate(device, _CACHE_COPY),
        copied=copied,
    )


def matmul_rate(device: torch.device, m: int, k: int, n: int) -> float:
    """Float32 FLOPs per second in `[m, k] @ [k, n]`."""
    a, b, out = (torch.ones(shape, device=device) for shape in ((m, k), (k, n), (m, n)))
    return 2 * m * k * n / best_seconds(lambda: torch.mm(a, b, out=out), device)


def largest_shape(config: RunConfig) -> tuple[int, int, int]:
    """m, k, n of `x V` at the site where this product is largest."""
    model = parts_of(config, compiled=False).model
    d_in, C = max(((s.d_in, s.C) for s in model.site_shapes().values()), key=math.prod)
    return config.train.batch_size, d_in, C


def _copy_rate(device: torch.device, size: int) -> float:
    source, target = torch.zeros(size // 4, device=device), torch.zeros(size // 4, device=device)
    return 2 * size / best_seconds(lambda: target.copy_(source), device)


def _activation_rate(device: torch.device, positions: int = 1024, hidden: int = 1024) -> float:
    h, w = torch.linspace(-2, 2, positions, device=device), torch.linspace(-1, 1, hidden, device=device)
    compiled = can_compile(device.type)
    run = Kernel(_sum_of_gelus, keep_in_registers=True) if compiled else _sum_of_gelus
    return positions * hidden / best_seconds(lambda: run(h, w), device)


def _sum_of_gelus(h: Float[Tensor, " positions"], w: Float[Tensor, " hidden"]) -> Float[Tensor, " positions"]:
    """Σ_j gelu(w_j h), the sum that a private MLP takes: by Abramowitz & Stegun 7.1.26, as `private_gelu`."""
    x = h[:, None] * w
    t = 1.0 / (1.0 + (0.3275911 / math.sqrt(2)) * x.abs())
    polynomial = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * polynomial * t * torch.exp(-0.5 * x * x)
    return (x * torch.where(x < 0, tail, 1.0 - tail)).sum(-1)


def best_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Least time of a call, after one that does not count."""
    run()
    found: list[float] = []
    while sum(found) < _SECONDS or len(found) < _FEWEST:
        wait_for(device)
        started = time.perf_counter()
        run()
        wait_for(device)
        found.append(time.perf_counter() - started)
    return min(found)


def last_level_cache(device: torch.device) -> int:
    """Size of the largest cache in bytes, as the system tells it; 32 MiB where it does not."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [
        path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(
        (1024 * int(size.removesuffix("K")) for size in sizes if size.endswith("K")), default=32 * _MIB
    )
