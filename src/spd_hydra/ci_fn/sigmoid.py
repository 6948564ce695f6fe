"""From pre-sigmoid values z to causal importances g in [0, 1]: pairs of leaky hard sigmoids.

The *lower* function makes masks, the *upper* one enters importance minimality. Both look like
clamp(z, 0, 1) and differ in where they let a gradient pass, so that a saturated subcomponent can
come back (method: paper, §2.3; the straight-through lower form is later practice).
"""

from enum import Enum
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

SLOPE = 0.01


class Sigmoid(Enum):
    """Which pair of functions turns z into the lower and the upper causal importance."""

    leaky_hard = "leaky_hard"
    leaky_hard_paper = "leaky_hard_paper"
    hard = "hard"
    sigmoid = "sigmoid"


class CausalImportance(NamedTuple):
    """Causal importances of one site, all `[..., C]`: `lower` for masks, `upper` for sparsity, `z` before."""

    lower: Float[Tensor, "*positions C"]
    upper: Float[Tensor, "*positions C"]
    z: Float[Tensor, "*positions C"]


def causal_importance(z: Float[Tensor, "*positions C"], sigmoid: Sigmoid) -> CausalImportance:
    """Both causal importances of pre-sigmoid values z."""
    return CausalImportance(lower=lower(z, sigmoid), upper=upper(z, sigmoid), z=z)


def upper(z: Tensor, sigmoid: Sigmoid = Sigmoid.leaky_hard) -> Tensor:
    """Upper function. Leaky: 0 up to z = 0 with zero gradient, z on (0, 1], slope 0.01 above 1."""
    if sigmoid is Sigmoid.sigmoid:
        return torch.sigmoid(z)
    # clamp(z, 0) would let the gradient pass at 0, where functions with zero biases start on inputs of zeros.
    # For p < 1 it is p·ε^(p-1) there, 5e5 for 0.5, which Adam's second moment would keep.
    positive = torch.where(z <= 0, 0.0, z)
    if sigmoid is Sigmoid.hard:
        return positive.clamp(max=1)
    return torch.where(z > 1, 1 + SLOPE * (z - 1), positive)


def lower(z: Tensor, sigmoid: Sigmoid = Sigmoid.leaky_hard) -> Tensor:
    """Lower function.

    `leaky_hard`: clamp(z, 0, 1) whose gradient below 0 is 0.01 of the incoming one where that would
    raise z (negative incoming gradient), else 0. `leaky_hard_paper`: true slope 0.01 below 0, so that
    masks can be slightly negative.
    """
    if sigmoid is Sigmoid.sigmoid:
        return torch.sigmoid(z)
    if sigmoid is Sigmoid.hard:
        return z.clamp(0, 1)
    if sigmoid is Sigmoid.leaky_hard_paper:
        return torch.where(z < 0, SLOPE * z, z.clamp(max=1))
    out: Tensor = _LowerLeaky.apply(z)  # type: ignore[no-untyped-call]
    return out


class _LowerLeaky(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor) -> Tensor:
        return z.clamp(0, 1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        below = torch.where(grad < 0, SLOPE * grad, 0.0)
        return torch.where(z <= 0, below, torch.where(z <= 1, grad, 0.0))
