"""In which numbers a run computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum

import torch


class Precision(Enum):
    """`fp32`; `tf32`, for matrix products alone; or `bf16`, by autocast.

    In all of them weights, optimiser, deltas, divergences and sums are float32. `tf32` rounds the factors of
    products to 10 bits of mantissa (float32 has 23, bfloat16 7) on GPUs that multiply such numbers several
    times faster; elsewhere it is `fp32`.
    """

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Within the `with` block products of float32 matrices, forward and backward, are of this precision.

    A setting of the process, so that it also holds for backward passes, which have threads of their own.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision is Precision.tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
