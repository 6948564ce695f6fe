"""Distances between the output of a masked pass and the target's output."""

from collections.abc import Iterator
from enum import Enum
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import log_softmax

_NUMBERS_AT_ONCE = 2**22  # of logits, of which each float32 copy then takes 16 MiB
_MOST_CHUNKS = 16  # a compiled graph holds each of them


class Divergence(Enum):
    """`mse`: mean over all output elements.

    `kl`: KL(target ‖ masked) of the softmax of logits, summed over classes, mean over positions.
    """

    mse = "mse"
    kl = "kl"


def divergence_sum(
    divergence: Divergence,
    masked: Float[Tensor, "*positions d"],
    target: Float[Tensor, "*positions d"],
    valid: Bool[Tensor, "*positions"] | None = None,
) -> tuple[Tensor, Tensor | int]:
    """The divergence summed over the batch, in float32, and the number it has to be divided by.

    Args:
        divergence: which distance.
        masked: output of the masked pass (logits for `kl`).
        target: output of the target.
        valid: False at positions that do not count; an output that is not per position counts whole.
    """
    divisor = target.shape[-1] if divergence is Divergence.mse else 1
    parts = _parts(divergence, masked, target, valid)
    if valid is None or valid.shape != target.shape[:-1]:
        return parts.sum(), target[..., 0].numel() * divisor
    return parts.sum(), valid.sum() * divisor


def divergence_by_row(
    divergence: Divergence,
    masked: Float[Tensor, "batch *rest d"],
    target: Float[Tensor, "batch *rest d"],
    valid: Bool[Tensor, "batch *rest"] | None = None,
) -> Float[Tensor, " batch"]:
    """The same sum for each row of the batch; over positions that count."""
    return _parts(divergence, masked, target, valid).flatten(1).sum(1)


def _parts(
    divergence: Divergence,
    masked: Float[Tensor, "*positions d"],
    target: Float[Tensor, "*positions d"],
    valid: Bool[Tensor, "*positions"] | None,
) -> Float[Tensor, "*positions parts"]:
    """What the divergence is the sum of, 0 where it does not count; one part per position if it is large."""
    if divergence is Divergence.mse:
        parts = (masked.float() - target.float()).square()
    elif target.numel() > _NUMBERS_AT_ONCE:
        parts = chunked_kl(masked, target)[..., None]
    else:
        parts = _kl_parts(masked, target)
    if valid is None or valid.shape != target.shape[:-1]:
        return parts
    return parts.where(valid[..., None], 0)


def _kl_parts(masked: Float[Tensor, "*positions d"], target: Float[Tensor, "*positions d"]) -> Tensor:
    log_p = log_softmax(target.float(), dim=-1)
    log_q = log_softmax(masked.float(), dim=-1)
    return log_p.exp() * (log_p - log_q)


def chunked_kl(
    masked: Float[Tensor, "*positions d"], target: Float[Tensor, "*positions d"]
) -> Float[Tensor, "*positions"]:
    """KL(target ‖ masked) of the softmax of logits at each position, in float32.

    A chunk of positions after the other, in the backward pass again: the float32 tensors that would each be
    as large as all logits are those of one chunk, a sixteenth at most or 16 MiB. The backward pass leaves
    one tensor of that size and of the logits' own precision, the gradient. None passes to the target.
    """
    kl: Tensor = _ChunkedKL.apply(masked.flatten(0, -2), target.detach().flatten(0, -2))  # type: ignore[no-untyped-call]
    return kl.view(target.shape[:-1])


class _ChunkedKL(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(masked: Tensor, target: Tensor) -> Tensor:
        return torch.cat([_kl_parts(*chunk).sum(-1) for _, *chunk in _chunks(masked, target)])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, " positions"]) -> tuple[Tensor, None]:
        masked, target = ctx.saved_tensors
        gradient = torch.empty_like(masked)
        for rows, own, wanted in _chunks(masked, target):
            # ∂KL/∂logits = softmax(masked) - softmax(target)
            difference = torch.softmax(own.float(), -1) - torch.softmax(wanted.float(), -1)
            gradient[rows] = (difference * grad[rows, None]).to(gradient.dtype)
        return gradient, None


def _chunks(*tensors: Float[Tensor, "positions d"]) -> Iterator[tuple[Any, ...]]:
    """Slices of positions, and of all tensors in them."""
    positions, d = tensors[0].shape
    size = max(1, _NUMBERS_AT_ONCE // d, -(-positions // _MOST_CHUNKS))
    for begin in range(0, positions, size):
        rows = slice(begin, begin + size)
        yield rows, *(tensor[rows] for tensor in tensors)
