"""Several processes that train one decomposition, each on its rows of the global batch.

Each rank computes the additive statistics of the loss on its rows. Their sum over ranks gives the loss of
the global batch, also for terms that are no mean over positions, and the sum of the ranks' gradients is the
gradient of that loss.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def rank() -> int:
    """Number of this process, from 0; 0 also where there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Within the `with` block this process is one of `WORLD_SIZE` (environment), if that is above 1.

    The environment is that of `torchrun`: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def own_rows(number: int) -> range:
    """The rows of a global batch of `number` rows that this rank works on: a contiguous share.

    The first `number % world_size()` ranks have one row more than the others.
    """
    each, left = divmod(number, world_size())
    first = rank() * each + min(rank(), left)
    return range(first, first + each + (rank() < left))


def global_sum(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor summed over ranks, in one message; the gradient passes to this rank's share as it is.

    Args:
        tensors: float32, the same shapes on every rank.
    """
    if world_size() == 1:
        return list(tensors)
    flat: Tensor = _GlobalSum.apply(torch.cat([tensor.reshape(-1) for tensor in tensors]))  # type: ignore[no-untyped-call]
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class _GlobalSum(torch.autograd.Function):
    """With L = f(Σ_r s_r) computed alike on every rank, ∂L/∂s_r = f' on each of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        # The functional form, which a tracer records like any other operation.
        import torch.distributed._functional_collectives as collectives  # noqa: PLC0415

        group = dist.group.WORLD
        assert group is not None, "there is a group where the world has more than one"
        summed: Tensor = collectives.wait_tensor(collectives.all_reduce(tensor, "sum", group))  # type: ignore[no-untyped-call]
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
