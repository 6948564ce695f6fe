"""What a text may hold, whether it is read at once or on the way: columns, nulls, encodings, too little."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.reader import ReaderSpec
from tests.data.test_tokens import KEY, TEXTS, WRITERS, all_documents, texts_of, tokens

from spd_hydra.data.tokenizing import make_reader
from spd_hydra.data.tokens import Tokens
from spd_hydra.section import ConfigError

WAYS = pytest.mark.parametrize("streaming", [False, True], ids=["cached", "streamed"])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refusal(source: Tokens, spec: ReaderSpec) -> str:
    """What is said when rows are read."""
    batches = source.bind(spec)
    with pytest.raises(ConfigError) as caught:
        batches(KEY, torch.arange(40))
    return str(caught.value)


def rows_of(source: Tokens, spec: ReaderSpec, number: int) -> list[list[int]]:
    """Rows without padding, sorted."""
    found = source.bind(spec)(KEY, torch.arange(number)).tolist()
    return sorted([token for token in row if token >= 0] for row in found)


@pytest.mark.parametrize("known", [True, False])
def test_a_token_between_documents_that_the_target_does_not_know_is_refused(
    known: bool, spec: ReaderSpec, tmp_path: Path
) -> None:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl")
    source = tokens(tmp_path / "a.jsonl", tmp_path)
    target = ReaderSpec(vocabulary=257 if known else 256, tokenizer=spec.tokenizer)
    if known:
        source.bind(target)
        return
    with pytest.raises(ConfigError) as caught:
        source.bind(target)
    assert str(caught.value) == (
        f"data.tokenizer: {spec.tokenizer} ends documents with token id 256, but the target takes ids below "
        "256; choose a tokenizer made for the target, or data.pack=false, which puts no such token between "
        "documents"
    )
    tokens(tmp_path / "a.jsonl", tmp_path, pack=False).bind(target)


@WAYS
@pytest.mark.parametrize(
    ("value", "column", "message"),
    [
        (1, "text_column", "which holds no text; name one of words, or data.token_column for lists of"),
        (["a", "b"], "text_column", "which holds no text; name one of words, or data.token_column for"),
        ([1, 2], "text_column", "which holds no text; name one of words, or data.token_column for lists"),
        (1, "token_column", "which holds no lists of token ids; name another column, or data.text_column"),
        ([0.5, 2.0], "token_column", "which holds no lists of token ids; name another column, or data.text"),
        ("a text", "token_column", "which holds text and no token ids; name it as data.text_column"),
    ],
)
def test_a_column_of_something_else_is_refused_before_it_is_read(
    value: Any, column: str, message: str, streaming: bool, spec: ReaderSpec, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [{"words": text, "other": value} for text in TEXTS])
    with pytest.raises(ConfigError) as caught:
        tokens(path, tmp_path, streaming=streaming, **{column: "other"}).bind(spec)
    assert str(caught.value).startswith(f"data.{column}: got other, {message}")


def test_a_column_of_a_saved_dataset_is_known_before_it_is_read(spec: ReaderSpec, tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS, "label": range(40)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(
        ConfigError, match=r"^data\.text_column: got label, which holds no text; name one of text"
    ):
        tokens(tmp_path / "saved", tmp_path, text_column="label").bind(spec)


@WAYS
@pytest.mark.parametrize("value", [1, ["a", "b"], [0.5, 2.0], [True], {"a": 1}, "a text", [1, 2]])
@pytest.mark.parametrize("column", ["text_column", "token_column"])
def test_what_was_not_known_of_a_column_is_refused_when_it_is_read(
    column: str, value: Any, streaming: bool, spec: ReaderSpec, tmp_path: Path
) -> None:
    import datasets

    fits = value == ("a text" if column == "text_column" else [1, 2])
    columns = {"text_column": None, "token_column": None} | {column: "other"}
    reader = make_reader(
        {"other": False}, **columns, tokenizer=spec.tokenizer, special_tokens=False, processes=1
    )
    rows = [{"other": None}, {"other": value}]
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError) as caught:
        if streaming:
            stream = datasets.IterableDataset.from_generator(lambda: iter(rows))
            documents = list(reader.streamed(stream, "a stream"))
        else:
            documents = list(reader.documents(datasets.Dataset.from_list(rows), tmp_path / "a.arrow")())
    what = "text" if column == "text_column" else "lists of token ids"
    if fits:
        ids = [ord(letter) for letter in "a text"] if column == "text_column" else [1, 2]
        assert [one.tolist() for one in documents] == [[], ids]
    else:
        assert str(caught.value).startswith(f"data.{column}: got other, which holds no {what}; name another")


def test_numbers_of_a_long_table_may_turn_out_to_be_text(spec: ReaderSpec, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"{n}\n" for n in range(100, 1100)) + "word\n")
    source = tokens(tmp_path / "a.csv", tmp_path, text_column="text", pack=False)
    assert all_documents(source, spec) == sorted([*map(str, range(100, 1100)), "word"])
    (tmp_path / "b.csv").write_text("text,id\n" + "a,1\n" * 1001)
    late = tokens(tmp_path / "b.csv", tmp_path, text_column="id")
    assert refusal(late, spec).startswith(
        "data.text_column: got id, which holds no text; name one of text, or"
    )
    (tmp_path / "c.csv").write_text("text,id\n" + "a,1\n" * 9)
    with pytest.raises(
        ConfigError, match=r"^data\.text_column: got id, which holds no text; name one of text"
    ):
        tokens(tmp_path / "c.csv", tmp_path, text_column="id").bind(spec)


@WAYS
def test_a_file_in_another_encoding_is_refused_with_the_reason(
    streaming: bool, spec: ReaderSpec, tmp_path: Path
) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("Motörhead\n\nand more".encode("latin-1"))
    what = str(path) if streaming else f"split train of {path}"
    assert refusal(tokens(path, tmp_path, streaming=streaming), spec) == (
        f"data: {what} cannot be read: 'utf-8' codec can't decode byte 0xf6 in position 3: invalid start "
        "byte; save it as UTF-8"
    )


@WAYS
def test_rows_without_a_list_of_tokens_are_passed_over(streaming: bool, tmp_path: Path) -> None:
    ids = [[97 + n % 26, 97 + n // 26, 33] for n in range(40)]
    rows: list[dict[str, Any]] = [{"ids": own} for own in ids]
    rows[::2] = [{"ids": None}] * 10 + [{"ids": []}] * 10
    source = tokens(
        write(tmp_path / "a.jsonl", rows), tmp_path, streaming=streaming, token_column="ids", length=3
    )
    assert set(map(tuple, rows_of(source, ReaderSpec(), 20))) <= set(map(tuple, ids))


@WAYS
@pytest.mark.parametrize("pack", [True, False])
def test_a_null_in_place_of_a_token_is_refused(streaming: bool, pack: bool, tmp_path: Path) -> None:
    rows = [{"ids": [65, None if n == 30 else 66, n]} for n in range(40)]
    source = tokens(
        write(tmp_path / "a.jsonl", rows),
        tmp_path,
        **{"streaming": streaming, "pack": pack, "token_column": "ids", "length": 3, "eval_fraction": 1e-6},
    )
    assert refusal(source, ReaderSpec()) == (
        "data.token_column: got ids, where a list of token ids holds a null; leave such rows out, or name "
        "another column"
    )


@WAYS
@pytest.mark.parametrize("pack", [True, False])
def test_empty_and_null_texts_are_as_if_they_were_not_there(
    pack: bool, streaming: bool, spec: ReaderSpec, tmp_path: Path
) -> None:
    full = [{"text": text} for text in TEXTS]
    gaps = [row for pair in zip(full, [{"text": ""}, {"text": None}] * 20, strict=True) for row in pair]
    how = {"pack": pack, "length": 13, "streaming": streaming}
    one, other = (
        tokens(write(tmp_path / f"{name}.jsonl", rows), tmp_path, **how).bind_eval(spec)
        for name, rows in (("full", full), ("gaps", gaps))
    )
    # Held-out rows of a stream come in the order of the text.
    assert texts_of(one, 4) == texts_of(other, 4)


def test_special_tokens_make_no_row_of_an_empty_text(spec: ReaderSpec, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    shutil.copytree(str(spec.tokenizer), tmp_path / "tokenizer")
    change_tokenizer(
        tmp_path / "tokenizer",
        post_processor={
            "type": "TemplateProcessing",
            "single": [
                {"SpecialToken": {"id": "<end>", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<end>", "type_id": 0}},
            ],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<end>": {"id": "<end>", "ids": [256], "tokens": ["<end>"]}},
        },
    )
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer")("")["input_ids"] == [256, 256]
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in [*TEXTS, "", None, ""]])
    source = tokens(path, tmp_path, tokenizer=str(tmp_path / "tokenizer"), pack=False, length=30)
    assert all_documents(source, spec) == sorted(f"|{text}|" for text in TEXTS)


@pytest.mark.parametrize(
    ("texts", "changes", "message"),
    [
        (
            ["one text"],
            {"eval_fraction": 1 - 1e-9},
            "data: no document is left to train on; take more text or",
        ),
        (
            ["one text", "two"],
            {"eval_fraction": 1e-9},
            "data.length: got 16, but all documents left to train on (number: 2) have 11 tokens together; ",
        ),
        (
            ["a", "b", ""],
            {"eval_fraction": 1e-9, "pack": False},
            "data.pack: got false, but none of the documents left to train on (number: 2) has the two tokens",
        ),
    ],
)
def test_a_stream_of_too_little_text_says_why(
    texts: list[str], changes: dict[str, Any], message: str, spec: ReaderSpec, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    assert refusal(tokens(path, tmp_path, streaming=True, **changes), spec).startswith(message)


def test_held_out_rows_of_a_stream_that_come_again_are_told_of_once(
    spec: ReaderSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "held_out.txt").write_text("\n\n".join(TEXTS[:5]))
    WRITERS["a.jsonl"](tmp_path / "a.jsonl")
    source = tokens(
        tmp_path / "a.jsonl", tmp_path, eval_name=str(tmp_path / "held_out.txt"), pack=False, streaming=True
    )
    batches = source.bind_eval(spec)
    batches(KEY, torch.arange(5))
    assert caplog.messages == batches.notes() == []
    for _ in range(3):
        batches(KEY, torch.arange(16))
    assert (
        caplog.messages
        == batches.notes()
        == [
            "data: only 5 held-out rows of 16 tokens, and evaluations ask for more: rows are measured "
            "several times; hold out more (data.eval_fraction, data.eval_split), or lower eval.batches "
            "or eval.batch_size"
        ]
    )


def change_tokenizer(directory: Path, **changes: Any) -> None:
    file = directory / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_rows_are_found_again_though_using_a_tokenizer_changes_its_state(
    spec: ReaderSpec, tmp_path: Path
) -> None:
    shutil.copytree(str(spec.tokenizer), tmp_path / "tokenizer")
    change_tokenizer(
        tmp_path / "tokenizer",
        truncation={"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        padding={
            **{"strategy": {"Fixed": 128}, "direction": "Right", "pad_to_multiple_of": None},
            **{"pad_id": 256, "pad_type_id": 0, "pad_token": "<end>"},
        },
    )
    WRITERS["a.jsonl"](tmp_path / "a.jsonl")
    source = tokens(
        tmp_path / "a.jsonl", tmp_path, tokenizer=str(tmp_path / "tokenizer"), pack=False, length=30
    )
    before = source.bind(spec)
    assert all_documents(source, spec) == sorted(TEXTS)  # neither cut nor padded
    assert source.bind(spec).digest == before.digest  # type: ignore[attr-defined]
    plain = tokens(tmp_path / "a.jsonl", tmp_path, pack=False, length=30).bind(spec)
    assert plain.digest == before.digest  # type: ignore[attr-defined]
