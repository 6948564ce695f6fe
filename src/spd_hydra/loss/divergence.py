"""Distances between the output of a masked pass and the target's output."""

from enum import Enum

from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import log_softmax


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
    if valid is not None and valid.shape != target.shape[:-1]:
        valid = None
    if divergence is Divergence.mse:
        parts, divisor = (masked.float() - target.float()).square(), target.shape[-1]
    else:
        log_p = log_softmax(target.float(), dim=-1)
        log_q = log_softmax(masked.float(), dim=-1)
        parts, divisor = log_p.exp() * (log_p - log_q), 1
    if valid is None:
        return parts.sum(), target[..., 0].numel() * divisor
    return parts.where(valid[..., None], 0).sum(), valid.sum() * divisor
