"""What GPUs do per second, by their makers' data sheets, for estimates where there is none of them."""

import dataclasses
from enum import Enum
from typing import NamedTuple

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


_PEAK = {  # TFLOP/s in float32 without TF32, as a run computes, in bfloat16 without sparsity; TB/s
    Gpu.A100: (19.5, 312.0, 2.04),
    Gpu.H100: (67.0, 989.0, 3.35),
    Gpu.H200: (67.0, 989.0, 4.8),
    Gpu.RTX4090: (82.6, 165.2, 1.01),
}


def peak_rates(gpu: Gpu, *, bf16: bool) -> Rates:
    """The most that a GPU can do."""
    fp32_rate, bf16_rate, memory = _PEAK[gpu]
    return Rates(matmul=1e12 * (bf16_rate if bf16 else fp32_rate), copy=1e12 * memory)


@dataclasses.dataclass(kw_only=True)
class Check(Section):
    """What task=check estimates for."""

    device: Gpu | None = option(
        None,
        "time of a step on a GPU that is not here: A100 | H100 | H200 | RTX4090; null: on this machine",
    )
