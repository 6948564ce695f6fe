"""Batches and random numbers of a step, from (seed, purpose, step) alone."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from spd_hydra import rng
from spd_hydra.compiling import Kernel, can_compile
from spd_hydra.data.base import Batches
from spd_hydra.transfer import send

Draw = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""From the keys of data and of random numbers to a batch and its random numbers."""


class Sampler:
    """Draws the batch of a step and the random numbers for its masks.

    Args:
        batches: the data.
        seed: the run's seed.
        purpose: keeps training, evaluation and other streams apart.
        rows: which rows of the global batch this process works on.
        rows_per_step: rows of the global batch, of which an ordered stream gives the next ones in every step.
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
        rows_per_step: int,
        columns: Int32[Tensor, " columns"],
        position_shape: tuple[int, ...] = (),
        compile: bool = False,
    ) -> None:
        self.batches, self.seed, self.purpose = batches, seed, purpose
        self.rows, self.columns = rows, columns.to(rows.device)
        self.rows_per_step = rows_per_step
        self._places = rows.cpu().long() if batches.ordered else rows
        self.position_shape, self.compile = position_shape, compile
        self.positions = position_index(rows, position_shape)
        fused = compile and batches.traceable and can_compile(rows.device.type)
        self.draw: Draw = Kernel(self.draw_all) if fused else self.draw_all
        can_fuse = compile and can_compile(rows.device.type)
        self._draw_numbers = Kernel(self.draw_numbers) if can_fuse else self.draw_numbers

    @property
    def from_keys(self) -> bool:
        """Whether `draw` gives a step's data: tensor arithmetic on the device, on the keys alone."""
        return self.batches.traceable and not self.batches.ordered

    def __call__(self, step: int) -> tuple[Tensor, Float[Tensor, "*positions columns"]]:
        """The batch of a step and its random numbers."""
        data_key, mask_key = (send(key, self.rows.device) for key in self.keys(step))
        if self.batches.ordered:
            return self.batch(step), self._draw_numbers(mask_key)
        return self.draw(data_key, mask_key)

    def batch(self, step: int) -> Tensor:
        """The batch of a step alone."""
        data_key, device = self.keys(step)[0], self.rows.device
        if not self.batches.ordered:
            return self.batches(send(data_key, device), self.rows)
        # Found on the CPU, where the rows are: asking a GPU for them would wait for all it has to do.
        return send(self.batches(data_key, self._places + step * self.rows_per_step), device)

    def others(self, purpose: str, step: int, number: int) -> Tensor:
        """Rows drawn for something else, from rows that count from 0: the same ones on all ranks.

        Of data that are drawn; an ordered stream has no others.
        """
        assert not self.batches.ordered, "rows of an ordered stream are those of its steps"
        rows = torch.arange(number, dtype=torch.int32, device=self.rows.device)
        return self.batches(send(rng.key(self.seed, purpose, step), self.rows.device), rows)

    def answers(self, step: int) -> Tensor | None:
        """What mask tokens of the batch of a step stand for; None: it has none."""
        places = self._places + (step * self.rows_per_step if self.batches.ordered else 0)
        found = self.batches.answers(self.keys(step)[0], places)
        return None if found is None else send(found, self.rows.device)

    def numbers(self, step: int, purpose: str, number: int) -> Float[Tensor, "*positions number"]:
        """Random numbers of a step in columns of their own, for what draws only when it needs them."""
        mask_key = send(self.keys(step)[1], self.rows.device)
        return rng.uniform(mask_key, self.positions, rng.columns(purpose, number).to(self.rows.device))

    def keys(self, step: int) -> tuple[Int32[Tensor, "2"], Int32[Tensor, "2"]]:
        """The keys of a step's data and of its random numbers, on the CPU."""
        data, masks = (torch.tensor(words, dtype=torch.int32) for words in self.key_words(step))
        return data, masks

    def key_words(self, step: int) -> tuple[list[int], list[int]]:
        """The words of both keys."""
        return (
            rng.key_words(self.seed, f"{self.purpose}/data", 0 if self.batches.ordered else step),
            rng.key_words(self.seed, f"{self.purpose}/masks", step),
        )

    def draw_all(self, data_key: Tensor, mask_key: Tensor) -> tuple[Tensor, Tensor]:
        """Batch and random numbers of these keys."""
        return self.batches(data_key, self.rows), self.draw_numbers(mask_key)

    def draw_numbers(self, mask_key: Tensor) -> Float[Tensor, "*positions columns"]:
        """Random numbers of this key."""
        return rng.uniform(mask_key, self.positions, self.columns)


class SplitSampler:
    """Draws the rows of a sampler in parts, each of which is a slice of what the sampler draws at once.

    Of an ordered stream the batch of the last step is kept: its parts are asked for several times, and some
    streams only go forward.

    Args:
        sampler: whose rows are cut, into contiguous parts of which the first have a row more if need be.
        parts: how many, at most as many as there are rows.
    """

    def __init__(self, sampler: Sampler, parts: int) -> None:
        assert parts <= len(sampler.rows), "every part has rows"
        self._sampler = sampler
        self.rows = sampler.rows.tensor_split(parts)
        device = sampler.rows.device.type
        can_fuse = sampler.compile and can_compile(device)
        self._draw = Kernel(self._draw_all) if can_fuse and sampler.batches.traceable else self._draw_all
        self._draw_numbers = Kernel(self._numbers) if can_fuse else self._numbers
        self._step = -1  # of `_parts`
        self._parts: Sequence[Tensor] = ()

    def __call__(self, step: int, part: int) -> tuple[Tensor, Float[Tensor, "*positions columns"]]:
        """The batch of a part of a step and its random numbers."""
        rows = self.rows[part]
        data_key, mask_key = (send(key, rows.device) for key in self._sampler.keys(step))
        if self._sampler.batches.ordered:
            return self._ordered(step)[part], self._draw_numbers(mask_key, rows)
        return self._draw(data_key, mask_key, rows)

    @property
    def rows_per_step(self) -> int:
        """Rows of the global batch."""
        return self._sampler.rows_per_step

    def _ordered(self, step: int) -> Sequence[Tensor]:
        if step != self._step:
            whole = self._sampler.batch(step)
            # Cloned, since a compiled kernel would copy an unaligned slice each time.
            self._parts = [part.clone() for part in whole.tensor_split(len(self.rows))]
            self._step = step
        return self._parts

    def _draw_all(self, data_key: Tensor, mask_key: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self._sampler.batches(data_key, rows), self._numbers(mask_key, rows)

    def _numbers(self, mask_key: Tensor, rows: Tensor) -> Float[Tensor, "*positions columns"]:
        positions = position_index(rows, self._sampler.position_shape)
        return rng.uniform(mask_key, positions, self._sampler.columns)


class StackedSampler:
    """Draws for several replicas at once, for each what its own sampler draws.

    Args:
        samplers: of the replicas; they differ in their seeds alone.
        compile: as for `Sampler`.
    """

    def __init__(self, samplers: Sequence[Sampler], *, compile: bool) -> None:
        self._samplers = samplers
        first = samplers[0]
        self._device = first.rows.device
        self.from_keys = first.from_keys
        fused = compile and self.from_keys and can_compile(self._device.type)
        draw = torch.vmap(first.draw_all)
        self.draw: Draw = Kernel(draw) if fused else draw

    def __call__(self, step: int) -> tuple[Tensor, Float[Tensor, "replicas *positions columns"]]:
        """The batches of a step, `[replicas, batch, …]`, and their random numbers."""
        if not self.from_keys:
            drawn = [sampler(step) for sampler in self._samplers]
            return torch.stack([batch for batch, _ in drawn]), torch.stack([draws for _, draws in drawn])
        data_keys, mask_keys = (send(keys, self._device) for keys in self.keys(step))
        return self.draw(data_keys, mask_keys)

    def keys(self, step: int) -> tuple[Int32[Tensor, "replicas 2"], Int32[Tensor, "replicas 2"]]:
        """The keys of all replicas, on the CPU."""
        words = [sampler.key_words(step) for sampler in self._samplers]
        data, masks = (torch.tensor(own, dtype=torch.int32) for own in zip(*words, strict=True))
        return data, masks


def position_index(rows: Int32[Tensor, " batch"], shape: tuple[int, ...]) -> Int32[Tensor, "*positions"]:
    """Index of every position in the global batch: row x positions per row + place in the row."""
    if not shape:
        return rows
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.int32, device=rows.device).view(shape)
    return rows.view(-1, *[1] * len(shape)) * places.numel() + places
