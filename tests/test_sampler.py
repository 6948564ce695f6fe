"""Batches and random numbers of a step: slices of one global batch, the same every time."""

import pytest
import torch
from torch import Tensor

from spd_hydra import rng
from spd_hydra.data.base import Batches
from spd_hydra.data.sparse_features import SparseFeatures
from spd_hydra.model.tms import TMS
from spd_hydra.sampler import Sampler, SplitSampler, position_index

BATCHES = SparseFeatures(feature_probability=0.5).bind(TMS(n_features=3))
COLUMNS = rng.columns("test", 4)


def rows(first: int, last: int) -> Tensor:
    return torch.arange(first, last, dtype=torch.int32)


def sampler(
    which: Tensor,
    *,
    seed: int = 0,
    purpose: str = "train",
    shape: tuple[int, ...] = (),
    compile: bool = False,
    columns: Tensor = COLUMNS,
    batches: Batches = BATCHES,
) -> Sampler:
    return Sampler(
        batches,
        seed=seed,
        purpose=purpose,
        rows=which,
        rows_per_step=8,
        columns=columns,
        position_shape=shape,
        compile=compile,
    )


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_a_slice_of_the_rows_is_that_slice_of_the_whole(shape: tuple[int, ...]) -> None:
    batch, draws = sampler(rows(0, 8), shape=shape)(3)
    part_batch, part_draws = sampler(rows(2, 6), shape=shape)(3)
    assert draws.shape == (8, *shape, 4)
    assert torch.equal(part_batch, batch[2:6])
    assert torch.equal(part_draws, draws[2:6])


def test_the_same_step_gives_the_same_numbers_whatever_came_before() -> None:
    fresh, used = sampler(rows(0, 8)), sampler(rows(0, 8))
    for step in (7, 1, 4):
        used(step)
    for ours, theirs in zip(fresh(5), used(5), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "other", [{"purpose": "eval"}, {"seed": 1}, {"step": 6}], ids=["purpose", "seed", "step"]
)
def test_streams_differ_between_purposes_seeds_and_steps(other: dict[str, int | str]) -> None:
    batch, draws = sampler(rows(0, 64))(5)
    step = int(other.pop("step", 5))
    other_batch, other_draws = sampler(rows(0, 64), **other)(step)
    assert not torch.equal(batch, other_batch)
    assert (draws == other_draws).float().mean() < 0.01


class Counted(Batches):
    """The places of an ordered stream themselves, moved by the key."""

    ordered = True

    def __call__(self, key: Tensor, rows: Tensor) -> Tensor:
        return rows + int(key[0])


def test_an_ordered_stream_goes_on_where_the_step_before_ended_also_for_a_slice() -> None:
    stream = [sampler(rows(0, 8), batches=Counted())(step)[0] for step in range(3)]
    start = int(stream[0][0])
    assert torch.cat(stream).tolist() == list(range(start, start + 24))
    part, draws = sampler(rows(2, 6), batches=Counted())(2)
    assert torch.equal(part, stream[2][2:6])
    assert torch.equal(draws, sampler(rows(2, 6))(2)[1])


class OnlyForward(Counted):
    """A stream of which no place can be had twice."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self, key: Tensor, rows: Tensor) -> Tensor:
        assert rows.min() >= self.next, "what was read is gone"
        self.next = int(rows.max()) + 1
        return super().__call__(key, rows)


def test_a_stream_that_only_goes_forward_gives_the_parts_of_a_step_as_often_as_they_are_asked_for() -> None:
    split = SplitSampler(sampler(rows(2, 7), batches=OnlyForward()), 2)
    for step in (0, 1, 4):
        whole, draws = sampler(rows(2, 7), batches=Counted())(step)
        for part, own in ((1, slice(3, 5)), (0, slice(0, 3)), (0, slice(0, 3)), (1, slice(3, 5))):
            found = split(step, part)
            assert torch.equal(found[0], whole[own])
            assert torch.equal(found[1], draws[own])


@pytest.mark.parametrize("batches", [BATCHES, None])
def test_the_batch_alone_is_that_of_the_step(batches: Batches | None) -> None:
    own = sampler(rows(2, 6), batches=batches or Counted())
    assert torch.equal(own.batch(3), own(3)[0])


def test_numbers_drawn_when_needed_are_slices_of_the_whole_and_of_no_other_purpose() -> None:
    whole, part = sampler(rows(0, 8), shape=(5,)), sampler(rows(2, 6), shape=(5,))
    numbers = whole.numbers(3, "random", 4)
    assert numbers.shape == (8, 5, 4)
    assert torch.equal(part.numbers(3, "random", 4), numbers[2:6])
    assert torch.equal(whole.numbers(3, "random", 2), numbers[..., :2])
    for other in (whole.numbers(3, "other", 4), whole.numbers(4, "random", 4), whole(3)[1]):
        assert not (other == numbers).any()


def test_data_does_not_depend_on_what_the_loss_draws() -> None:
    few = sampler(rows(0, 8), columns=COLUMNS[:1])(2)
    many = sampler(rows(0, 8))(2)
    assert torch.equal(few[0], many[0])
    assert torch.equal(few[1], many[1][:, :1])


def test_torch_s_global_generator_is_neither_read_nor_moved() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = sampler(rows(0, 8))(1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(sampler(rows(0, 8))(1)[1], first[1])


@pytest.mark.slow
def test_the_compiled_draw_is_the_eager_one() -> None:
    for ours, theirs in zip(sampler(rows(0, 33), compile=True)(4), sampler(rows(0, 33))(4), strict=True):
        assert torch.equal(ours, theirs)


def test_positions_are_numbered_row_by_row() -> None:
    assert torch.equal(position_index(rows(2, 4), ()), rows(2, 4))
    assert position_index(rows(2, 4), (3,)).tolist() == [[6, 7, 8], [9, 10, 11]]
    assert position_index(rows(1, 3), (2, 2)).tolist() == [[[4, 5], [6, 7]], [[8, 9], [10, 11]]]
    assert position_index(rows(0, 2), (2, 2)).dtype == torch.int32
