"""Text files in pieces: nothing of a file is lost, and a text ends where the file does."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from tests.data.reader import END
from tests.data.test_tokens import tokens

from spd_hydra.data import text_pieces
from spd_hydra.data.packing import Layout
from spd_hydra.data.text_pieces import pieces
from spd_hydra.data.text_source import TextUnit


@pytest.mark.parametrize(
    "text",
    [
        "one\n\ntwo three four\n\n\nfive six seven\nand on\n\neight\n\n",
        "\n\n\nbegins with blank lines\n \n\t\nand has some of spaces\n\nend",
        "no blank line at all\n" * 9,
        "one line alone, without a break",
        "\n\n",
        "",
    ],
)
def test_pieces_joined_are_the_text(text: str) -> None:
    found = list(pieces(text.splitlines(keepends=True), 10))
    assert "".join(found) == text
    assert all(len(piece) >= 10 for piece in found[:-1])


def test_a_piece_ends_before_the_break_that_a_blank_line_follows() -> None:
    text = "a paragraph\n\nanother one\nof two lines\n\n\nthe last"
    found = list(pieces(text.splitlines(keepends=True), 10))
    assert found == ["a paragraph", "\n\nanother one\nof two lines", "\n\n\nthe last"]


def rows_as_text(source: Any, spec: Any, part: str) -> str:
    rows = source.bind(spec)._open_store().rows(part)
    return "".join("|" if token == END else chr(token) for token in rows.reshape(-1))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz", "folder"])
def test_packed_files_keep_their_blank_lines_and_end_once(
    name: str, spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [f"{first}\n\n" + "\n\n\n".join(f"paragraph {n}\nof file" for n in range(20)) for first in "xyz"]
    names = [f"folder/{n}.txt" for n in range(3)] if name == "folder" else [name]
    (tmp_path / "folder").mkdir()
    for own, text in zip(names, files, strict=False):
        data = gzip.compress(text.encode()) if own.endswith(".gz") else text.encode()
        (tmp_path / own).write_bytes(data)
    monkeypatch.setattr(text_pieces, "_AT_ONCE", 3)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"text": "something else"}\n')
    source = tokens(tmp_path / name, tmp_path, length=2, eval_name=str(held_out))
    whole = "".join(f"{text}|" for text in files[: len(names)])
    assert rows_as_text(source, spec, "train") == whole[: len(whole) // 2 * 2]


def test_texts_also_end_where_a_piece_is_held_out(spec: Any, tmp_path: Path) -> None:
    paragraphs = [f"paragraph {number:02d}" for number in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs))
    source = tokens(tmp_path / "a.txt", tmp_path, length=2, eval_fraction=0.3)
    found = {part: rows_as_text(source, spec, part) for part in ("train", "eval")}
    held_out = {text for text in paragraphs if text in found["eval"]}
    assert 5 < len(held_out) < 40
    assert held_out.isdisjoint(text for text in paragraphs if text in found["train"])
    expected = ""
    for before, text in zip([None, *paragraphs], paragraphs, strict=False):
        if text not in held_out:
            between = "\n\n" if before is not None else ""
            expected += ("|" if before in held_out and expected else "") + between + text
    expected += "|"
    assert found["train"] == expected[: len(expected) // 2 * 2]


def test_every_way_to_cut_a_file_has_a_place_of_its_own_in_the_cache(spec: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n\n" * 9)
    ways = [{"text_unit": unit, "pack": pack} for unit in TextUnit for pack in (True, False)]
    bound: list[Any] = [tokens(tmp_path / "a.txt", tmp_path, **way).bind(spec) for way in ways]
    digests = {own.digest for own in bound}
    assert len(digests) == len(ways)


def test_a_part_of_a_split_is_a_part_of_the_pieces(spec: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"paragraph {number:02d}" for number in range(60)))
    source = tokens(tmp_path / "a.txt", tmp_path, length=2, split="train[:50%]", eval_split="train[50%:]")
    found = {part: rows_as_text(source, spec, part) for part in ("train", "eval")}
    marks = ("paragraph 29", "paragraph 30")
    assert [mark in found["train"] for mark in marks] == [True, False]
    assert [mark in found["eval"] for mark in marks] == [False, True]


def test_where_files_are_cut_is_told_when_they_are_tokenised(
    spec: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"paragraph {number:02d}" for number in range(60)))
    caplog.set_level("INFO")
    tokens(tmp_path / "a.txt", tmp_path).bind(spec)._open_store()  # type: ignore[attr-defined]
    assert "data.text_unit: files are cut into pieces of whole paragraphs" in caplog.text


def test_rows_do_not_depend_on_how_many_tokens_are_joined_at_once() -> None:
    import numpy as np

    documents = [np.arange(number % 7) for number in range(50)]
    layout = Layout(length=5, pack=True, begin=(8,), end=9, vocab_size=10)
    expected = [token for one in documents if len(one) for token in (8, *one, 9)]
    for at_once in (1, 17, 10_000):
        rows = np.concatenate(list(layout.rows(documents, at_once=at_once)))
        assert rows.reshape(-1).tolist() == expected[: len(expected) // 5 * 5]
