"""The order of rows: all of them once per epoch, the same for every number of ranks and after a restart."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from spd_hydra import rng
from spd_hydra.data.base import Batches
from spd_hydra.data.packing import Layout
from spd_hydra.data.token_batches import TokenBatches
from spd_hydra.data.token_store import HELD_OUT, TRAIN, open_or_make, write_store
from spd_hydra.sampler import Sampler

ROWS = 101


def batches_of(part: str, tmp_path: Path) -> TokenBatches:
    """Rows [n, n], for n = 0 … 100 to train on and n = 500 … 504 held out."""
    layout = Layout(length=2, pack=True, end=None, vocab_size=1000)
    documents = [np.array([number, number]) for number in range(ROWS)]
    held_out = [np.array([number, number]) for number in range(500, 505)]

    def open_store() -> object:
        return open_or_make(
            tmp_path / "a", lambda path: write_store(path, layout, lambda: documents, lambda: held_out, 0.5)
        )

    return TokenBatches(
        digest="a",
        part=part,
        length=2,
        padded=False,
        open_store=open_store,
        load_tokenizer=lambda: None,
    )


@pytest.fixture
def batches(tmp_path: Path) -> TokenBatches:
    """Rows [n, n] for n = 0 … 100."""
    return batches_of(TRAIN, tmp_path)


def sampled(batches: TokenBatches, steps: range, *, size: int, ranks: int = 1, seed: int = 0) -> list[int]:
    """What all ranks together see in these steps, each rank's rows in their order."""
    shares = [torch.arange(size, dtype=torch.int32).tensor_split(ranks)[rank] for rank in range(ranks)]
    samplers = [
        Sampler(
            batches,
            seed=seed,
            purpose="train",
            rows=rows,
            rows_per_step=size,
            columns=torch.zeros(0, dtype=torch.int32),
        )
        for rows in shares
    ]
    return [int(row[0]) for step in steps for sampler in samplers for row in sampler.batch(step)]


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("size", [7, 10])
def test_every_epoch_has_every_row_exactly_once(batches: TokenBatches, ranks: int, size: int) -> None:
    seen = sampled(batches, range(3 * ROWS // size), size=size, ranks=ranks)
    for epoch in range(2):
        assert sorted(seen[epoch * ROWS : (epoch + 1) * ROWS]) == list(range(ROWS))


def test_epochs_and_seeds_have_orders_of_their_own(batches: TokenBatches) -> None:
    seen = sampled(batches, range(2), size=ROWS)
    first, second = seen[:ROWS], seen[ROWS:]
    other = sampled(batches, range(1), size=ROWS, seed=1)
    for order, another in ((first, second), (first, other), (first, list(range(ROWS)))):
        # Two random orders agree at one place in expectation.
        assert sum(a == b for a, b in zip(order, another, strict=True)) < 8


def test_ranks_read_disjoint_shards_of_the_batch_that_one_process_reads(batches: TokenBatches) -> None:
    assert sampled(batches, range(9), size=12, ranks=3) == sampled(batches, range(9), size=12)


def test_a_restart_in_the_middle_of_an_epoch_goes_on_where_it_was(batches: TokenBatches) -> None:
    whole = sampled(batches, range(20), size=8)
    assert whole[: 5 * 8] + sampled(batches, range(5, 20), size=8) == whole


def test_held_out_rows_that_come_again_are_told_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held_out = batches_of(HELD_OUT, tmp_path)
    assert sorted(sampled(held_out, range(1), size=5)) == [500, 501, 502, 503, 504]
    assert caplog.messages == held_out.notes() == []
    sampled(held_out, range(4), size=4)
    assert (
        caplog.messages
        == held_out.notes()
        == [
            "data: only 5 held-out rows of 2 tokens, and evaluations ask for more: rows are measured "
            "several times; hold out more (data.eval_fraction, data.eval_split), or lower eval.batches "
            "or eval.batch_size"
        ]
    )


def test_epochs_of_training_are_nothing_to_tell_of(
    batches: TokenBatches, caplog: pytest.LogCaptureFixture
) -> None:
    sampled(batches, range(3), size=ROWS)
    assert caplog.messages == []


def test_the_content_is_the_digest_of_the_rows_of_the_part(tmp_path: Path) -> None:
    train, held_out = batches_of(TRAIN, tmp_path), batches_of(HELD_OUT, tmp_path)
    numbers = {TRAIN: range(ROWS), HELD_OUT: range(500, 505)}
    for batches in (train, held_out):
        rows = np.array([[number, number] for number in numbers[batches.part]], dtype=np.uint16)
        assert batches.content() == hashlib.sha256(rows.tobytes()).hexdigest()
    assert train.content() != held_out.content()


def test_batches_that_are_not_known_before_they_are_asked_for_have_no_content() -> None:
    assert Batches().content() is None


def test_a_check_before_the_run_reads_nothing(batches: TokenBatches, tmp_path: Path) -> None:
    found = batches(rng.key(0, "example").to("meta"), torch.arange(8, dtype=torch.int32, device="meta"))
    assert found.shape == (8, 2)
    assert found.dtype == torch.int64
    assert not (tmp_path / "a").exists()
