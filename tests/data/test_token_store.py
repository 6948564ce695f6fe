"""Rows in the cache: whole or not there, made once, parts that share nothing."""

import errno
import hashlib
import json
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from spd_hydra.data import token_store
from spd_hydra.data.packing import Layout
from spd_hydra.data.token_store import HELD_OUT, TRAIN, TokenStore, open_or_make, write_store
from spd_hydra.section import ConfigError

LAYOUT = Layout(length=2, pack=True, end=None, vocab_size=1000)


def texts(*numbers: int) -> Callable[[], Iterable[np.ndarray]]:
    return lambda: [np.array([number, number]) for number in numbers]


def written(directory: Path) -> TokenStore:
    return write_store(directory, LAYOUT, texts(*range(100)), None, 0.2)


def fail(directory: Path) -> TokenStore:
    (directory / "train.bin").write_bytes(b"half")
    raise OSError("disk full")


def test_a_share_of_the_documents_is_held_out_and_none_is_lost(tmp_path: Path) -> None:
    store = written(tmp_path)
    train, held_out = (store.rows(part)[:, 0].tolist() for part in (TRAIN, HELD_OUT))
    assert sorted(train + held_out) == list(range(100))
    assert 5 <= len(held_out) <= 40


def test_held_out_documents_that_are_trained_on_are_left_out_and_counted(tmp_path: Path) -> None:
    store = write_store(tmp_path, LAYOUT, texts(1, 2, 3, 4), texts(9, 2, 8, 4, 7), 0.5)
    assert store.rows(TRAIN)[:, 0].tolist() == [1, 2, 3, 4]
    assert store.rows(HELD_OUT)[:, 0].tolist() == [9, 8, 7]
    assert store.facts["overlap"] == 2
    told = "held-out documents are also among those to train on; they are left out of the evaluation"
    for found in (store, TokenStore.open(tmp_path)):
        assert found is not None
        assert found.notes() == [f"data: 2 of 5 {told}"]
    del store.facts["held_out"]  # as an older version wrote it
    assert store.notes() == [f"data: 2 {told}"]


def test_an_empty_document_on_both_sides_is_no_overlap(tmp_path: Path) -> None:
    empty = np.array([], dtype=np.int64)
    store = write_store(
        tmp_path, LAYOUT, lambda: [*texts(1)(), empty], lambda: [empty, *texts(2)(), empty], 0.5
    )
    assert store.facts["overlap"] == 0
    assert store.notes() == []
    assert store.facts["rows"] == {TRAIN: 1, HELD_OUT: 1}


def test_where_all_held_out_documents_are_trained_on_nothing_can_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^data\.eval_split or data\.eval_name: not one held-out row is left without the 2 documents "
        r"that are also trained on; name other data$",
    ):
        write_store(tmp_path, LAYOUT, texts(1, 2, 3), texts(1, 2), 0.5)


LONG = Layout(length=50, pack=True, end=7, vocab_size=1000)
PADDED = Layout(length=50, pack=False, end=None, vocab_size=1000)
ALL, NOTHING = 1 - 1e-9, 1e-9  # shares


@pytest.mark.parametrize(
    ("layout", "own", "held_out", "share", "message"),
    [
        (
            *(LAYOUT, texts(1), None, ALL),
            "data.eval_fraction: none of 1 documents is left to train on; take more text or another "
            "data.eval_fraction, of text files that are one document another data.text_unit, or name",
        ),
        (
            *(LAYOUT, texts(1), None, NOTHING),
            "data.eval_fraction: none of 1 documents is held out; take more",
        ),
        (*(LAYOUT, texts(), None, 0.5), "data: no document is left to train on; take more text or"),
        (*(LAYOUT, texts(), texts(1), 0.5), "data: no document is left to train on; take more text or"),
        (*(LAYOUT, texts(1), texts(), 0.5), "data: no document is held out; take more text or"),
        (
            *(LONG, texts(1, 2), texts(3), 0.5),
            "data.length: got 50, but all documents left to train on (number: 2) have 4 tokens together; "
            "take a smaller length, more text, or",
        ),
        (
            *(LONG, texts(*range(30)), texts(31), 0.5),  # 60 tokens and 30 ends
            "data.length: got 50, but all documents held out (number: 1) have 2 tokens together; take",
        ),
        (
            *(PADDED, lambda: [np.array([1]), np.array([2])], texts(3), 0.5),
            "data.pack: got false, but none of the documents left to train on (number: 2) has the two tokens "
            "that a row needs; take longer documents, see data.text_unit, or data.pack=true",
        ),
    ],
)
def test_where_no_row_is_left_the_message_says_why(
    layout: Layout, own: Any, held_out: Any, share: float, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        write_store(tmp_path, layout, own, held_out, share)
    assert str(caught.value).startswith(message)


def test_it_is_made_once_and_then_read(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(directory: Path) -> TokenStore:
        made.append(directory)
        return written(directory)

    first = open_or_make(tmp_path / "tokens" / "a", make)
    again = open_or_make(tmp_path / "tokens" / "a", make)
    assert len(made) == 1
    assert np.array_equal(first.rows(TRAIN), again.rows(TRAIN))


@pytest.mark.parametrize("file", ["train.bin", "facts.json"])
def test_what_is_damaged_is_made_again_with_a_warning(
    file: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = open_or_make(tmp_path / "a", written)
    expected = whole.rows(TRAIN).tolist()
    path = tmp_path / "a" / file
    path.write_bytes(path.read_bytes()[:-3])
    assert open_or_make(tmp_path / "a", written).rows(TRAIN).tolist() == expected
    assert "cannot be used and are made again" in caplog.text


@pytest.mark.parametrize("file", ["train.bin", "eval.bin"])
@pytest.mark.parametrize("same_process", [True, False])
def test_rows_of_the_right_length_and_other_content_are_made_again_with_one_warning(
    file: str, same_process: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    whole = open_or_make(tmp_path / "a", written)
    expected = whole.rows(TRAIN).tolist()
    path = tmp_path / "a" / file
    status = path.stat()
    path.write_bytes(bytes(status.st_size))  # what a power cut leaves
    if not same_process:
        monkeypatch.setattr(token_store, "_checked", set())
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + same_process))
    assert open_or_make(tmp_path / "a", written).rows(TRAIN).tolist() == expected
    assert caplog.messages == [
        f"The tokens in {tmp_path / 'a'} cannot be used and are made again: {file} is damaged (its digest "
        "does not match)"
    ]
    assert open_or_make(tmp_path / "a", fail).facts == whole.facts


def test_rows_without_a_digest_are_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    facts = open_or_make(tmp_path / "a", written).facts
    older = {name: fact for name, fact in facts.items() if name != "sha256"}
    (tmp_path / "a" / "facts.json").write_text(json.dumps(older))
    assert open_or_make(tmp_path / "a", written).facts == facts
    assert caplog.messages == [
        f"The tokens in {tmp_path / 'a'} cannot be used and are made again: an older version wrote them, "
        "without a digest"
    ]


def test_rows_are_read_whole_once_per_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_or_make(tmp_path / "a", written)
    monkeypatch.setattr(token_store, "_checked", set())
    read: list[str] = []
    digest = hashlib.file_digest

    def counted(file: Any, name: str) -> Any:
        read.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    for _ in range(3):
        open_or_make(tmp_path / "a", fail)
    assert read == ["train.bin", "eval.bin"]


def test_the_content_of_a_part_is_the_digest_of_its_file(tmp_path: Path) -> None:
    store = open_or_make(tmp_path / "a", written)
    for part in (TRAIN, HELD_OUT):
        data = store.rows(part).tobytes()
        assert store.content(part) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize(
    ("place", "named", "reason"),
    [("null/x/a", "null/x", "Not a directory"), ("file/a", "file", "File exists")],
)
def test_a_cache_that_cannot_be_made_is_named_without_another_warning(
    place: str, named: str, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "null").symlink_to("/dev/null")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        open_or_make(tmp_path / place, written)
    assert str(caught.value) == (
        f"cache_dir: cannot write {tmp_path / named}: {reason}; check that it is writable and has room, or "
        "choose another place with cache_dir=…"
    )
    assert caplog.messages == []


def test_a_cache_that_may_not_be_entered_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*arguments: Any, **more: Any) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for call in ("read_text", "mkdir", "stat"):  # root may enter everywhere
        monkeypatch.setattr(Path, call, refused)
    with pytest.raises(ConfigError) as caught:
        open_or_make(tmp_path / "tokens" / "a", written)
    assert str(caught.value).startswith(f"cache_dir: cannot write {tmp_path / 'tokens'}: Permission denied; ")
    assert caplog.messages == []


def test_on_a_full_disk_nothing_is_left_that_could_be_taken_for_rows(tmp_path: Path) -> None:
    def full(directory: Path) -> TokenStore:
        (directory / "eval.bin").symlink_to("/dev/full")
        return written(directory)

    with pytest.raises(
        ConfigError, match=r"^cache_dir: cannot write .*/eval\.bin: No space left on device; check"
    ):
        open_or_make(tmp_path / "a", full)
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]


def test_a_failure_leaves_nothing_that_could_be_taken_for_rows(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk full"):
        open_or_make(tmp_path / "a", fail)
    assert TokenStore.open(tmp_path / "a") is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]


def _slowly(directory: Path, barrier: object, made: object) -> None:
    def documents() -> Iterator[np.ndarray]:
        made.value += 1  # type: ignore[attr-defined]
        yield from texts(*range(100))()

    barrier.wait()  # type: ignore[attr-defined]
    open_or_make(directory, lambda path: write_store(path, LAYOUT, documents, None, 0.2))


def test_of_several_processes_that_start_at_once_one_makes_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, made = context.Barrier(3), context.Value("i", 0)
    processes = [context.Process(target=_slowly, args=(tmp_path / "a", barrier, made)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert made.value == 2  # one process, which reads the documents once for each part
    assert len(open_or_make(tmp_path / "a", written).rows(TRAIN)) > 0


def test_after_a_kill_while_it_is_made_it_is_made_anew(tmp_path: Path) -> None:
    def die(directory: Path) -> TokenStore:
        written(directory)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    process = multiprocessing.get_context("fork").Process(target=open_or_make, args=(tmp_path / "a", die))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert TokenStore.open(tmp_path / "a") is None
    assert len(open_or_make(tmp_path / "a", written).rows(TRAIN)) > 0
