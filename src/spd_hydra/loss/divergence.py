"""Distances between the output of a masked pass and the target's output."""

import itertools
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_hydra.compiling import Kernel, is_tracing

_NUMBERS_AT_ONCE = 2**22  # of logits, of which each float32 copy then takes 16 MiB
_MOST_CHUNKS = 16


class Divergence(Enum):
    """`mse`: mean over all output elements.

    `kl`: KL(target ‖ masked) of the softmax of logits, summed over classes, mean over positions.
    `auto`: `kl` of a target that gives logits, else `mse`; a whole configuration has one of these instead.
    """

    auto = "auto"
    mse = "mse"
    kl = "kl"


def divergence_sum(
    divergence: Divergence,
    masked: Float[Tensor, "*positions d"],
    target: Float[Tensor, "*positions d"],
    valid: Bool[Tensor, "*positions"] | None = None,
    target_normaliser: Float[Tensor, "*positions 2"] | None = None,
    *,
    compiled: bool = False,
) -> tuple[Tensor, Tensor | int]:
    """The divergence summed over the batch, in float32, and the number it has to be divided by.

    Args:
        divergence: which distance.
        masked: output of the masked pass (logits for `kl`).
        target: output of the target.
        valid: False at positions that do not count; an output that is not per position counts whole.
        target_normaliser: for `kl`, `log_normaliser(target)`, if it is known.
        compiled: take `kl` by compiled kernels.
    """
    parts = _parts(divergence, masked, target, valid, target_normaliser, compiled=compiled)
    return parts.sum(), divergence_count(divergence, target, valid)


def divergence_count(
    divergence: Divergence,
    target: Float[Tensor, "*positions d"],
    valid: Bool[Tensor, "*positions"] | None = None,
) -> Tensor | int:
    """The number that the summed divergence has to be divided by."""
    divisor = target.shape[-1] if divergence is Divergence.mse else 1
    if valid is None or valid.shape != target.shape[:-1]:
        return target[..., 0].numel() * divisor
    return valid.sum() * divisor


def divergence_by_row(
    divergence: Divergence,
    masked: Float[Tensor, "batch *rest d"],
    target: Float[Tensor, "batch *rest d"],
    valid: Bool[Tensor, "batch *rest"] | None = None,
    target_normaliser: Float[Tensor, "batch *rest 2"] | None = None,
) -> Float[Tensor, " batch"]:
    """The same sum for each row of the batch; over positions that count."""
    return _parts(divergence, masked, target, valid, target_normaliser).flatten(1).sum(1)


def _parts(
    divergence: Divergence,
    masked: Float[Tensor, "*positions d"],
    target: Float[Tensor, "*positions d"],
    valid: Bool[Tensor, "*positions"] | None,
    target_normaliser: Float[Tensor, "*positions 2"] | None = None,
    *,
    compiled: bool = False,
) -> Float[Tensor, "*positions parts"]:
    """What the divergence is the sum of, 0 where it does not count."""
    if divergence is Divergence.mse:
        parts = (masked.float() - target.float()).square()
    else:
        parts = kl_by_position(masked, target, target_normaliser, compiled=compiled)[..., None]
    if valid is None or valid.shape != target.shape[:-1]:
        return parts
    return parts.where(valid[..., None], 0)


def log_normaliser(logits: Float[Tensor, "*positions d"]) -> Float[Tensor, "*positions 2"]:
    """log Σ exp of the logits at each position in two parts, in float32: the largest logit, and the rest.

    In parts because logits are often large: their sum would have lost digits that a small divergence needs.
    """
    parts = [_log_normaliser(own.float()) for (own,) in _chunks(logits.flatten(0, -2))]
    return torch.cat(parts).view(*logits.shape[:-1], 2)


def _log_normaliser(logits: Float[Tensor, "positions d"]) -> Float[Tensor, "positions 2"]:
    largest = logits.detach().amax(-1, keepdim=True)
    return torch.cat([largest, (logits - largest).exp().sum(-1, keepdim=True).log()], -1)


def _log_chances(
    logits: Float[Tensor, "positions d"], normaliser: Float[Tensor, "positions 2"]
) -> Float[Tensor, "positions d"]:
    return logits.float() - normaliser[:, :1] - normaliser[:, 1:]


def kl_by_position(
    masked: Float[Tensor, "*positions d"],
    target: Float[Tensor, "*positions d"],
    target_normaliser: Float[Tensor, "*positions 2"] | None = None,
    *,
    compiled: bool = False,
) -> Float[Tensor, "*positions"]:
    """KL(target ‖ masked) of the softmax of logits at each position, in float32.

    A chunk of positions after the other, in the backward pass again: the float32 tensors that would each be
    as large as all logits are those of one chunk, a sixteenth at most or 16 MiB. The backward pass leaves
    one tensor of that size and of the logits' own precision, the gradient. None passes to the target.

    Args:
        masked: logits of the masked pass.
        target: logits of the target.
        target_normaliser: what `log_normaliser` gives for them, where several passes share it.
        compiled: by kernels that read the logits and write the gradient, and make nothing of their size.
    """
    target = target.detach()
    normaliser = log_normaliser(target) if target_normaliser is None else target_normaliser
    flat = [tensor.flatten(0, -2) for tensor in (masked, target, normaliser)]
    kl, _ = _KL.apply(*flat, compiled)  # type: ignore[no-untyped-call]
    return cast(Tensor, kl).view(target.shape[:-1])


class _KL(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(masked: Tensor, target: Tensor, normaliser: Tensor, compiled: bool) -> tuple[Tensor, Tensor]:
        kl, own = (_value_compiled if compiled else _value)(masked, target, normaliser)
        return kl, own

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.compiled = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Float[Tensor, " positions"], _: Tensor) -> tuple[Tensor | None, ...]:
        gradient: Callable[..., Tensor] = _gradient_compiled if ctx.compiled else _gradient
        return gradient(*ctx.saved_tensors, grad), None, None, None


def _value(masked: Tensor, target: Tensor, normaliser: Tensor) -> tuple[Tensor, Tensor]:
    """KL at each position, and the normaliser of the masked pass."""
    found, normalisers = [], []
    for q, t, n in _chunks(masked, target, normaliser):
        normalisers.append(_log_normaliser(q.float()))
        log_p, log_q = _log_chances(t, n), _log_chances(q, normalisers[-1])
        found.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(found), torch.cat(normalisers)


def _gradient(masked: Tensor, target: Tensor, normaliser: Tensor, own: Tensor, grad: Tensor) -> Tensor:
    """∂KL/∂logits = softmax(masked) - softmax(target), times what comes back at each position."""
    parts = (
        ((_log_chances(q, m).exp() - _log_chances(t, n).exp()) * g[:, None]).to(q.dtype)
        for q, t, n, m, g in _chunks(masked, target, normaliser, own, grad)
    )
    return _joined(parts, masked)


_value_compiled = Kernel(_value)
_gradient_compiled = Kernel(_gradient)


def _joined(chunks: Iterator[Tensor], like: Float[Tensor, "positions d"]) -> Float[Tensor, "positions d"]:
    """Chunks as one tensor; each is put into its place before the next is made."""
    first = next(chunks)
    if len(first) == len(like):
        return first
    whole, begin = torch.empty_like(like), 0
    for chunk in itertools.chain([first], chunks):
        whole[begin : begin + len(chunk)] = chunk
        begin += len(chunk)
    return whole


def _chunks(first: Float[Tensor, "positions d"], *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """The tensors, some positions at a time; all at once where a compiler fuses what is done with them."""
    positions, d = first.shape
    size = positions if is_tracing() else max(1, _NUMBERS_AT_ONCE // d, -(-positions // _MOST_CHUNKS))
    for begin in range(0, positions, size):
        yield tuple(tensor[begin : begin + size] for tensor in (first, *others))
