"""Value and gradient of a scalar at the same time, so that nothing waits in memory for the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def with_gradient(
    function: Callable[[list[Tensor]], Float[Tensor, ""]], tensors: Sequence[Tensor]
) -> Float[Tensor, ""]:
    """The value of a function, whose backward pass is taken now and is later scaled with what comes back.

    For a loss that is a sum of many passes through a model: a pass leaves one gradient for each of its
    inputs, and not its activations. No arithmetic is added, for a gradient is linear in what it is
    scaled with.

    Args:
        function: of as many tensors, in their place. Leaves of the autograd graph, such as parameters, it
            may also use as they are; what else it depends on gets no gradient.
        tensors: where gradients are wanted; those that need none are passed on.
    """
    value: Tensor = _WithGradient.apply(function, *tensors)  # type: ignore[no-untyped-call]
    return value


def is_mapped() -> bool:
    """Whether the code runs inside `torch.vmap`, where only transforms can differentiate."""
    return torch._C._functorch.maybe_current_level() is not None


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[[list[Tensor]], Tensor], *tensors: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[1:]
        with torch.enable_grad():
            # A gradient must not go on to what the tensors were computed from.
            leaves = [t if t.is_leaf else t.detach().requires_grad_() for t in tensors]
            # As views, because what watches modules (FLOP counters) cannot take leaves as their inputs.
            value = function([leaf.view_as(leaf) for leaf in leaves])
            wanted = [leaf for leaf, own in zip(leaves, needed, strict=True) if own]
            gradients = iter(torch.autograd.grad(value, wanted, allow_unused=True))
        ctx.save_for_backward(*(next(gradients) if own else None for own in needed))
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(own if own is None else own * grads[0] for own in ctx.saved_tensors)
