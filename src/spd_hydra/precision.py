"""In which numbers a run computes."""

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


class Precision(Enum):
    """`fp32`; `tf32`, for matrix products alone; or `bf16`, by autocast.

    In all of them weights, optimiser, weight deltas, divergences and sums are float32. `tf32` rounds the
    factors of other products to 10 bits of mantissa (float32 has 23, bfloat16 7) on GPUs that multiply such
    numbers several times faster; elsewhere it is `fp32`.
    """

    fp32 = "fp32"
    tf32 = "tf32"
    bf16 = "bf16"


@contextmanager
def products_in(precision: Precision) -> Iterator[None]:
    """Within the `with` block products of float32 matrices, forward and backward, are of this precision.

    A setting of the process, so that it also holds for backward passes, which have threads of their own.
    """
    # torch.set_float32_matmul_precision would also set CPUs that know TF32.
    products = torch.backends.cuda.matmul
    before = products.allow_tf32
    products.allow_tf32 = precision is Precision.tf32
    try:
        yield
    finally:
        products.allow_tf32 = before


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of float32 matrices, forward and backward, in float32 also where others are in TF32.

    For differences of large numbers: of W and V U, TF32 would leave some 1e-7 of the mean square of W.

    Args:
        a: `[…, n, k]`.
        b: `[…, k, m]`.
    """
    if torch.backends.cuda.matmul.allow_tf32:
        product: Tensor = _exact_product(a, b)
        return product
    return a @ b


@torch.library.custom_op("spd_hydra::exact_product", mutates_args=())
def _exact_product(a: Tensor, b: Tensor) -> Tensor:
    # An operation of its own: a setting of the process has to be changed while it runs, also compiled.
    with products_in(Precision.fp32):
        return a @ b


@_exact_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a @ b


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
    a, b = ctx.saved_tensors
    return _exact_product(gradient, b.mT), _exact_product(a.mT, gradient)


_exact_product.register_autograd(_gradients, setup_context=_keep)


@_exact_product.register_vmap
def _(info: Any, axes: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    a, b = (x if axis is None else x.movedim(axis, 0) for x, axis in zip((a, b), axes, strict=True))
    return _exact_product(a, b), 0


@register_flop_formula(torch.ops.spd_hydra.exact_product)
def _flops(a: torch.Size, b: torch.Size, out_shape: torch.Size | None = None, **others: Any) -> int:
    """Of each entry of the product a multiplication and an addition per summand."""
    return 2 * torch.Size(a).numel() * b[-1]
