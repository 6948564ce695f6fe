"""Documents as rows: what is in them, and what is refused."""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spd_hydra.data.packing import Layout, Tally, fingerprint, is_held_out, write_rows
from spd_hydra.section import ConfigError


def documents(*texts: list[int]) -> list[np.ndarray]:
    return [np.array(text, dtype=np.int32) for text in texts]


def rows(layout: Layout, texts: list[np.ndarray], at_once: int = 1 << 20) -> list[list[int]]:
    return [row.tolist() for some in layout.rows(texts, at_once=at_once) for row in some]


@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_packed_rows_are_the_documents_with_an_end_behind_each_cut_where_they_are_full(at_once: int) -> None:
    layout = Layout(length=4, pack=True, end=9, vocab_size=10)
    texts = documents([1, 2, 3], [4], [5, 6, 7, 8, 1, 2])
    # 1 2 3 9 | 4 9 5 6 | 7 8 1 2 | 9, which is not full
    assert rows(layout, texts, at_once) == [[1, 2, 3, 9], [4, 9, 5, 6], [7, 8, 1, 2]]


@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_packed_documents_have_their_begin_once_in_front_of_each(at_once: int) -> None:
    layout = Layout(length=4, pack=True, begin=(7, 8), end=9, vocab_size=10)
    texts = documents([1, 2, 3], [], [7, 8, 4], [7], [8, 7, 5, 6])  # the third begins so by itself
    # 7 8 1 2 | 3 9 7 8 | 4 9 7 8 | 7 9 7 8 | 8 7 5 6 | 9
    assert rows(layout, texts, at_once) == [
        [7, 8, 1, 2], [3, 9, 7, 8], [4, 9, 7, 8], [7, 9, 7, 8], [8, 7, 5, 6],
    ]  # fmt: skip


def test_unpacked_documents_are_as_the_tokenizer_made_them_whatever_the_begin() -> None:
    layout = Layout(length=3, pack=False, begin=(7,), end=9, vocab_size=10)
    assert rows(layout, documents([1, 2], [3, 4, 5, 6])) == [[1, 2, -1], [3, 4, 5]]


def test_layouts_that_differ_in_what_begins_a_document_are_told_apart() -> None:
    before = {"length": 4, "pack": True, "end": 9, "vocab_size": 10}
    layout = Layout(length=4, pack=True, end=9, vocab_size=10)
    assert dataclasses.asdict(layout) == before | {"begin": ()}
    assert dataclasses.asdict(dataclasses.replace(layout, begin=(7,))) == before | {"begin": (7,)}


@pytest.mark.parametrize("pack", [True, False])
def test_documents_without_tokens_leave_no_trace(pack: bool) -> None:
    layout = Layout(length=3, pack=pack, end=9 if pack else None, vocab_size=10)
    texts = [[1, 2], [3, 4, 5], [6, 7]]
    with_empty = documents([], texts[0], [], [], texts[1], texts[2], [])
    assert rows(layout, with_empty) == rows(layout, documents(*texts))


@pytest.mark.parametrize(("pack", "n_rows"), [(True, 3), (False, 2)])
def test_a_tally_counts_documents_with_tokens_these_tokens_and_rows(pack: bool, n_rows: int) -> None:
    layout = Layout(length=3, pack=pack, end=9 if pack else None, vocab_size=10)
    tally = Tally()
    for _ in layout.rows(documents([1, 2], [], [3], [4, 5, 6, 7]), tally, at_once=1):
        pass
    # Packed 1 2 9 | 3 9 4 | 5 6 7 | 9; else [3] has no next token.
    assert tally == Tally(documents=3, tokens=7, rows=n_rows)


def test_without_an_end_documents_follow_each_other() -> None:
    layout = Layout(length=2, pack=True, end=None, vocab_size=10)
    assert rows(layout, documents([1, 2, 3], [4, 5])) == [[1, 2], [3, 4]]


@pytest.mark.parametrize("at_once", [1, 1000])
def test_unpacked_rows_are_one_document_each_cut_or_padded_with_minus_one(at_once: int) -> None:
    layout = Layout(length=3, pack=False, end=None, vocab_size=10)
    texts = documents([1, 2], [3], [4, 5, 6, 7])  # the one of a single token has no next one
    assert rows(layout, texts, at_once) == [[1, 2, -1], [4, 5, 6]]


@pytest.mark.parametrize(
    ("pack", "vocab_size", "dtype"),
    [(True, 65_536, "uint16"), (True, 65_537, "int32"), (False, 10, "int32")],
)
def test_a_file_holds_every_id_and_padding(pack: bool, vocab_size: int, dtype: str, tmp_path: Path) -> None:
    layout = Layout(length=2, pack=pack, end=None, vocab_size=vocab_size)
    assert layout.dtype == np.dtype(dtype)
    tally, _ = write_rows(tmp_path / "rows", documents([vocab_size - 1, 0, 1, 2]), layout)
    assert tally.rows == (2 if pack else 1)
    assert np.fromfile(tmp_path / "rows", dtype)[:2].tolist() == [vocab_size - 1, 0]


def test_rows_are_on_the_disk_with_the_digest_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, int]] = []

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced.append((status.st_ino, status.st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    layout = Layout(length=2, pack=True, end=None, vocab_size=1 << 20)
    many = [np.arange(600_000), np.arange(600_000)]  # more than is written at once
    tally, digest = write_rows(tmp_path / "rows", many, layout)
    status = (tmp_path / "rows").stat()
    assert tally.rows == 600_000
    assert digest == hashlib.sha256(np.concatenate(many).astype(np.int32).tobytes()).hexdigest()
    assert digest == hashlib.sha256((tmp_path / "rows").read_bytes()).hexdigest()
    assert synced == [(status.st_ino, status.st_size)]


@pytest.mark.parametrize(
    ("place", "reason"), [("/dev/full", "No space left on device"), ("/dev/null/rows", "Not a directory")]
)
def test_a_file_that_cannot_be_written_is_named_with_the_reason(place: str, reason: str) -> None:
    layout = Layout(length=2, pack=True, end=None, vocab_size=10)
    with pytest.raises(ConfigError) as caught:
        write_rows(Path(place), documents([1, 2, 3, 4]), layout)
    assert str(caught.value) == (
        f"cache_dir: cannot write {place}: {reason}; check that it is writable and has room, or choose "
        "another place with cache_dir=…"
    )


def test_an_error_of_the_text_is_not_taken_for_one_of_the_file(tmp_path: Path) -> None:
    def unreadable() -> Iterator[np.ndarray]:
        yield from documents([1, 2])
        raise OSError("the text")

    with pytest.raises(OSError, match=r"^the text$"):
        write_rows(tmp_path / "rows", unreadable(), Layout(length=2, pack=True, end=None, vocab_size=10))


@pytest.mark.parametrize("token", [10, -1])
def test_an_id_that_the_target_does_not_have_is_refused(token: int) -> None:
    layout = Layout(length=2, pack=True, end=None, vocab_size=10)
    with pytest.raises(
        ConfigError, match=rf"the token id {token}, but the target takes ids below 10; choose"
    ):
        rows(layout, documents([1, token, 3, 4]))


def test_copies_of_a_document_are_on_the_same_side_and_the_share_held_out_is_as_asked() -> None:
    texts = [np.array([number, 7]) for number in range(4000)]
    held_out = [is_held_out(text, 0.25) for text in texts]
    assert held_out == [is_held_out(text.astype(np.int32), 0.25) for text in texts]
    assert sum(held_out) == pytest.approx(1000, abs=5 * (4000 * 0.25 * 0.75) ** 0.5)
    assert len({fingerprint(text) for text in texts}) == 4000
