"""What GPUs do per second, by their makers' data sheets, for estimates where there is none of them."""

import dataclasses
from enum import Enum
from typing import NamedTuple

from spd_hydra.precision import Precision
from spd_hydra.section import Section, option


class Gpu(Enum):
    """A GPU by name: SXM modules of A100 (80 GB), H100 and H200, and the RTX 4090."""

    A100 = "A100"
    H100 = "H100"
    H200 = "H200"
    RTX4090 = "RTX4090"


class Rates(NamedTuple):
    """What a device does per second: FLOPs of matrix products, bytes read and written by a copy."""

    matmul: float
    copy: float


class _Peak(NamedTuple):
    """TFLOP/s of matrix products, without sparsity, and TB/s of memory."""

    fp32: float
    tf32: float
    bf16: float
    memory: float


_PEAK = {
    Gpu.A100: _Peak(fp32=19.5, tf32=156.0, bf16=312.0, memory=2.04),
    Gpu.H100: _Peak(fp32=67.0, tf32=494.5, bf16=989.0, memory=3.35),
    Gpu.H200: _Peak(fp32=67.0, tf32=494.5, bf16=989.0, memory=4.8),
    Gpu.RTX4090: _Peak(fp32=82.6, tf32=82.6, bf16=165.2, memory=1.01),
}


def peak_rates(gpu: Gpu, precision: Precision) -> Rates:
    """The most that a GPU can do."""
    peak = _PEAK[gpu]
    return Rates(matmul=1e12 * getattr(peak, precision.name), copy=1e12 * peak.memory)


@dataclasses.dataclass(kw_only=True)
class Check(Section):
    """What task=check estimates for."""

    device: Gpu | None = option(
        None,
        "time of a step on a GPU that is not here: A100 | H100 | H200 | RTX4090; null: on this machine",
    )
