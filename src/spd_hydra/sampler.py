"""Batches and random numbers of a step, from (seed, purpose, step) alone."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from spd_hydra import rng
from spd_hydra.compiling import Kernel, can_compile
from spd_hydra.data.base import Batches


class Sampler:
    """Draws the batch of a step and the random numbers for its masks.

    Args:
        batches: the data.
        seed: the run's seed.
        purpose: keeps training, evaluation and other streams apart.
        rows: which rows of the global batch this process works on.
        columns: random numbers per position, as columns of `rng.uniform`.
        position_shape: shape of the positions of one row: `()` for vectors, `(length,)` for text.
        compile: fuse the draws into one kernel, where that is possible.
    """

    def __init__(
        self,
        batches: Batches,
        *,
        seed: int,
        purpose: str,
        rows: Int32[Tensor, " batch"],
        columns: Int32[Tensor, " columns"],
        position_shape: tuple[int, ...] = (),
        compile: bool = False,
    ) -> None:
        self.batches, self.seed, self.purpose = batches, seed, purpose
        self.rows, self.columns = rows, columns.to(rows.device)
        self.positions = position_index(rows, position_shape)
        fused = compile and batches.traceable and can_compile(rows.device.type)
        self._draw = Kernel(self._draw_all) if fused else self._draw_all

    def __call__(self, step: int) -> tuple[Tensor, Float[Tensor, "*positions columns"]]:
        """The batch of a step and its random numbers."""
        data_key = rng.key(self.seed, f"{self.purpose}/data", step).to(self.rows.device)
        mask_key = rng.key(self.seed, f"{self.purpose}/masks", step).to(self.rows.device)
        return self._draw(data_key, mask_key)

    def _draw_all(self, data_key: Tensor, mask_key: Tensor) -> tuple[Tensor, Tensor]:
        return self.batches(data_key, self.rows), rng.uniform(mask_key, self.positions, self.columns)


def position_index(rows: Int32[Tensor, " batch"], shape: tuple[int, ...]) -> Int32[Tensor, "*positions"]:
    """Index of every position in the global batch: row x positions per row + place in the row."""
    if not shape:
        return rows
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=rows.device).view(shape)
    return rows.view(-1, *[1] * len(shape)) * places.numel() + places
