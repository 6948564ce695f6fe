"""Distances between the output of a masked pass and the target's output."""

from enum import Enum

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import log_softmax


class Divergence(Enum):
    """`mse`: mean over all output elements.

    `kl`: KL(target ‖ masked) of the softmax of logits, summed over classes, mean over positions.
    """

    mse = "mse"
    kl = "kl"


def divergence_sum(
    divergence: Divergence, masked: Float[Tensor, "*positions d"], target: Float[Tensor, "*positions d"]
) -> tuple[Tensor, int]:
    """The divergence summed over the batch, in float32, and the number it has to be divided by.

    Args:
        divergence: which distance.
        masked: output of the masked pass (logits for `kl`).
        target: output of the target.
    """
    if divergence is Divergence.mse:
        return (masked.float() - target.float()).square().sum(), target.numel()
    log_p = log_softmax(target.float(), dim=-1)
    log_q = log_softmax(masked.float(), dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(), target.numel() // target.shape[-1]
