"""Text from files and saved datasets as batches of tokens; what is refused, in one line."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.reader import END, ReaderSpec
from tests.model.tiny_hf import saved_model

from spd_hydra import rng
from spd_hydra.data import token_batches
from spd_hydra.data.text_source import TextUnit
from spd_hydra.data.tokens import Tokens
from spd_hydra.model.base import TargetSpec
from spd_hydra.section import ConfigError

TEXTS = [f"text number {number}" for number in range(40)]
KEY = rng.key(0, "train")


def tokens(name: Path | str, tmp_path: Path, **more: Any) -> Tokens:
    return Tokens(
        name=str(name), cache_dir=str(tmp_path / "cache"), **({"length": 16, "eval_fraction": 0.3} | more)
    )


def texts_of(batches: Any, number: int) -> list[str]:
    """The text of rows, in the order of the stream, `|` where a document ends."""
    rows = batches(KEY, torch.arange(number, dtype=torch.int32)).tolist()
    return ["".join("|" if t == END else "" if t < 0 else chr(t) for t in row) for row in rows]


def all_documents(source: Tokens, spec: Any) -> list[str]:
    """Every document of unpacked rows, those to train on and those held out."""
    found = []
    for batches in (source.bind(spec), source.bind_eval(spec)):
        number = len(batches._open_store().rows(batches.part))  # type: ignore[attr-defined]
        found += texts_of(batches, number)
    return sorted(found)


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(TEXTS)))


def write_json(path: Path) -> None:
    path.write_text(json.dumps([{"id": n, "text": text} for n, text in enumerate(TEXTS)]))


def write_csv(path: Path) -> None:
    path.write_text("id,text\n" + "".join(f"{n},{text}\n" for n, text in enumerate(TEXTS)))


def write_parquet(path: Path) -> None:
    import datasets

    datasets.Dataset.from_dict({"id": range(40), "text": TEXTS}).to_parquet(path)


def write_saved(path: Path) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS})}).save_to_disk(path)


def write_text(path: Path) -> None:
    path.write_text("\n\n".join(TEXTS))


WRITERS: dict[str, Callable[[Path], None]] = {
    "a.txt": write_text,
    "a.jsonl": write_jsonl,
    "a.json": write_json,
    "a.csv": write_csv,
    "a.parquet": write_parquet,
    "saved": write_saved,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_document_of_every_kind_of_file_is_read(name: str, spec: Any, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    source = tokens(tmp_path / name, tmp_path, pack=False, length=30, eval_fraction=0.3)
    assert all_documents(source, spec) == sorted(TEXTS)


def test_files_of_a_folder_and_of_a_pattern_are_read_whole_or_by_lines(spec: Any, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "below").mkdir(parents=True)
    for number, text in enumerate(TEXTS):
        where = folder if number % 2 else folder / "below"
        (where / f"{number}.txt").write_text(f"{text}\n\nend")
    whole = tokens(folder, tmp_path, pack=False, length=40, text_unit=TextUnit.file)
    assert all_documents(whole, spec) == sorted(f"{text}\n\nend" for text in TEXTS)
    lines = tokens(folder / "*.txt", tmp_path, pack=False, length=40, text_unit=TextUnit.line)
    # An empty line has no two tokens; copies of `end` are on one side.
    assert sorted({*all_documents(lines, spec)}) == sorted([*TEXTS[1::2], "end"])


def test_packed_rows_hold_documents_end_to_end_and_positions_are_never_padding(
    spec: Any, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    batches = tokens(tmp_path / "a.jsonl", tmp_path).bind(spec)
    rows = batches._open_store().rows("train")  # type: ignore[attr-defined]
    text = "".join("|" if token == END else chr(token) for token in rows.reshape(-1))
    documents = text.split("|")[:-1]
    assert documents == [one for one in TEXTS if one in documents]  # in the order of the file
    assert not batches.padded
    assert texts_of(batches, len(rows)) != [text[i : i + 16] for i in range(0, len(text), 16)]


def test_a_column_of_tokens_is_taken_as_it_is(spec: Any, tmp_path: Path) -> None:
    import datasets

    ids = [[number, 200, 100] for number in range(50)]
    datasets.Dataset.from_dict({"ids": ids, "text": ["x"] * 50}).save_to_disk(tmp_path / "saved")
    source = tokens(tmp_path / "saved", tmp_path, token_column="ids", length=3)
    batches = source.bind(ReaderSpec())  # which has no tokenizer
    rows = batches._open_store().rows("train").tolist()  # type: ignore[attr-defined]
    assert all(row in ids for row in rows)
    assert len(rows) > 30
    assert batches.decode([3]) is None


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_tokens_is_taken_as_it_is_also_beside_a_tokenizer_that_ends_texts(
    streaming: bool, spec: Any, tmp_path: Path
) -> None:
    import datasets

    ids = [[number, 200, 100] for number in range(50)]
    datasets.Dataset.from_dict({"ids": ids}).save_to_disk(tmp_path / "saved")
    source = tokens(
        tmp_path / "saved",
        tmp_path,
        **{"token_column": "ids", "length": 3, "tokenizer": spec.tokenizer, "streaming": streaming},
    )
    batches = source.bind(ReaderSpec())
    assert all(row in ids for row in batches(KEY, torch.arange(30)).tolist())
    assert batches.decode([104]) == ["h"]


def test_held_out_data_of_their_own_lose_what_is_trained_on_and_every_run_is_told(
    spec: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    parts = {"train": {"text": TEXTS}, "test": {"text": ["new text", TEXTS[3], "another one"]}}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_dict(part) for name, part in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    source = tokens(tmp_path / "saved", tmp_path, eval_split="test", pack=False, length=30)
    told = "data: 1 of 3 held-out documents are also among those to train on; they are left out of the "
    for _ in ("made", "from the cache"):
        held_out = source.bind_eval(spec)
        assert sorted(texts_of(held_out, 2)) == ["another one", "new text"]
        assert held_out.notes() == [f"{told}evaluation"]
    assert caplog.text.count(told) == 1
    monkeypatch.setattr(token_batches, "_told", set())  # as in another process
    texts_of(source.bind(spec), 1)
    assert caplog.text.count(told) == 2
    assert f"{told}evaluation" in source.prefetch(spec)


def test_tokens_have_their_texts(spec: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    assert tokens(tmp_path / "a.jsonl", tmp_path).bind(spec).decode([104, 105, -1]) == ["h", "i", ""]


def test_several_processes_give_the_same_rows_as_one(spec: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    one = tokens(tmp_path / "a.jsonl", tmp_path).bind(spec)
    two = Tokens(
        name=str(tmp_path / "a.jsonl"),
        cache_dir=str(tmp_path / "other"),
        length=16,
        eval_fraction=0.3,
        processes=2,
    ).bind(spec)
    assert texts_of(one, 20) == texts_of(two, 20)


def test_a_stream_gives_the_documents_and_reads_again_up_to_where_a_run_goes_on(
    spec: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    source = tokens(tmp_path / "a.jsonl", tmp_path, streaming=True, pack=False, length=30, eval_fraction=0.3)
    held_out = set(texts_of(source.bind_eval(spec), 5))
    whole = texts_of(source.bind(spec), 20)
    assert len(set(whole)) == 20
    assert not held_out & set(whole)
    assert held_out | set(whole) <= set(TEXTS)
    assert not (tmp_path / "cache").exists()
    again = source.bind(spec)(KEY, torch.arange(12, 20)).tolist()
    assert ["".join(chr(t) for t in row if t >= 0) for row in again] == whole[12:]
    assert (
        "reading 12 rows again to go on where the run stopped; the next ones are those of the run only if "
        "the source gives the same text in the same order"
    ) in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"text_column": "txt"},
            r"data.text_column: got txt, which the data do not have; name one of id, text",
        ),
        (
            {"token_column": "ids"},
            r"data.token_column: got ids, which the data do not have; name one of id, text",
        ),
        (
            {"length": 65},
            r"data.length: got 65, but the target takes at most 64 tokens; set data.length=64 or",
        ),
        (
            {"tokenizer": "/nowhere/at/all"},
            r"data.tokenizer: got /nowhere/at/all, which is no directory and no id of the hub such as",
        ),
        (
            {"text_column": "text", "token_column": "id"},
            r"token_column: got id beside text_column=text; give one",
        ),
    ],
)
def test_mistakes_are_found_when_it_is_bound(
    changes: dict[str, Any], message: str, spec: Any, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=message):
        tokens(tmp_path / "a.jsonl", tmp_path, **changes).bind(spec)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(("context", "length"), [(64, 64), (513, 512), (None, 512)])
def test_rows_are_by_default_as_long_as_the_target_takes_up_to_512(
    context: int | None, length: int, spec: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"paragraph {number}" for number in range(500)))
    target = dataclasses.replace(spec, context=context)
    batches = tokens(tmp_path / "a.txt", tmp_path, length=None).bind(target)
    assert batches(KEY, torch.arange(1)).shape == (1, length)


def test_more_than_one_column_of_text_has_to_be_chosen_from(spec: Any, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    with pytest.raises(
        ConfigError, match=r"data.text_column: got null, and more than one column holds text; name"
    ):
        tokens(tmp_path / "a.jsonl", tmp_path).bind(spec)


def test_a_target_without_tokens_or_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    source = tokens(tmp_path / "a.jsonl", tmp_path)
    with pytest.raises(ConfigError, match=r"data: tokens cannot feed TargetSpec, which takes none; choose"):
        source.bind(TargetSpec())
    with pytest.raises(
        ConfigError, match=r"data.tokenizer: got null, and the target has none of its own; name"
    ):
        source.bind(ReaderSpec())


def test_ids_above_what_the_target_knows_are_refused(spec: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    batches = tokens(tmp_path / "a.jsonl", tmp_path, pack=False).bind(
        ReaderSpec(vocabulary=101, tokenizer=spec.tokenizer)
    )
    with pytest.raises(
        ConfigError, match=r"the text has the token id \d+, but the target takes ids below 101"
    ):
        texts_of(batches, 1)


@pytest.mark.parametrize("name", ["/nowhere/at/all.txt", "./missing", "no/such/dataset"])
def test_a_path_that_is_not_there_is_no_name_of_the_hub(name: str, spec: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"data.name: got {name}, where there is no file of .txt, .md"):
        tokens(name, tmp_path).bind(spec)


def test_a_file_of_a_kind_that_is_not_read_is_told_as_one(spec: Any, tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("a\tb\n")
    with pytest.raises(ConfigError, match=r"data.name: got a file of a kind that is not read \(.*t.tsv\)"):
        tokens(tmp_path / "t.tsv", tmp_path).bind(spec)


@pytest.mark.parametrize("name", ["t.txt", "t.jsonl", "t.parquet"])
def test_a_path_is_no_pattern(spec: Any, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    WRITERS[f"a.{name.rpartition('.')[2]}"](folder / name)
    plain = tmp_path / "plain"
    plain.mkdir()
    WRITERS[f"a.{name.rpartition('.')[2]}"](plain / name)
    found, wanted = (tokens(where / name, tmp_path).bind(spec) for where in (folder, plain))
    key, rows = rng.key(0, "train", 0), torch.arange(2, dtype=torch.int32)
    assert torch.equal(found(key, rows), wanted(key, rows))


def test_a_folder_that_reads_as_a_pattern_is_told(spec: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run[1]"
    folder.mkdir()
    WRITERS["a.jsonl"](folder / "a.jsonl")
    with pytest.raises(ConfigError, match=r"has one of \* \? \[ in its path"):
        tokens(folder, tmp_path).bind(spec)


def test_files_of_different_kinds_are_refused(spec: Any, tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv"):
        WRITERS[f"a.{name.rpartition('.')[2]}"](tmp_path / name)
    with pytest.raises(ConfigError, match=r"data.name: got files that are not of one kind"):
        tokens(tmp_path, tmp_path).bind(spec)


def test_a_dataset_that_cannot_be_reached_names_the_command_and_the_variable(
    spec: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError) as caught:
        tokens("nobody/nothing", tmp_path).bind(spec)
    assert "data.name: got nobody/nothing, which is no local file and cannot be had from the hub" in str(
        caught.value
    )
    assert "spd-run task=prefetch" in str(caught.value)
    assert "HF_HUB_OFFLINE=1" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_split_names_those_there_are(spec: Any, tmp_path: Path) -> None:
    write_saved(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"data.split: got test, but .*saved has train"):
        tokens(tmp_path / "saved", tmp_path, split="test").bind(spec)


@pytest.mark.parametrize("name", WRITERS)
def test_data_are_looked_at_while_a_model_without_values_is_built(
    name: str, spec: Any, tmp_path: Path
) -> None:
    WRITERS[name](tmp_path / name)
    with torch.device("meta"):
        batches = tokens(tmp_path / name, tmp_path, eval_fraction=0.3).bind(spec)
    assert texts_of(batches, 1)


@pytest.mark.parametrize("kind", ["fixed", "large", "with gaps"])
def test_token_columns_of_every_kind_of_list_are_read(kind: str, spec: Any, tmp_path: Path) -> None:
    import datasets

    ids = [[97 + n % 26, 97 + n // 26, 33] for n in range(40)]
    value = datasets.Value("int32")
    features = {
        "fixed": datasets.List(value, length=3),
        "large": datasets.LargeList(value),
        "with gaps": datasets.List(value),
    }
    rows: list[list[int] | None] = [
        None if kind == "with gaps" and n % 4 == 0 else i for n, i in enumerate(ids)
    ]
    made = datasets.Dataset.from_dict({"ids": rows}, features=datasets.Features({"ids": features[kind]}))
    made.save_to_disk(tmp_path / "saved")
    source = tokens(
        tmp_path / "saved",
        tmp_path,
        token_column="ids",
        text_column=None,
        pack=False,
        length=4,
        eval_fraction=0.3,
    )
    wanted = sorted("".join(map(chr, row)) for row in rows if row is not None)
    assert all_documents(source, spec) == wanted


def test_a_split_that_is_not_there_is_named_by_its_key(spec: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    write_saved(tmp_path / "saved")
    for name, where in (("a.jsonl", "what is read from files"), ("saved", str(tmp_path / "saved"))):
        for key, more in (("split", ""), ("eval_split", "; or name other data with data.eval_name")):
            with pytest.raises(ConfigError) as caught:
                tokens(tmp_path / name, tmp_path, **{key: "test"}).bind(spec)
            assert str(caught.value) == f"data.{key}: got test, but {where} has train{more}"


def test_files_that_hold_nothing_are_named(spec: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ConfigError, match=r"^data\.name: .*a\.txt holds nothing$"):
        tokens(tmp_path / "a.txt", tmp_path).bind(spec)


def test_a_directory_without_a_tokenizer_is_not_taken_for_one(tmp_path: Path, spec: Any) -> None:
    saved_model("gpt2", tmp_path / "model")
    write_text(tmp_path / "a.txt")
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: got .*model, which has no tokenizer; name one"):
        tokens(tmp_path / "a.txt", tmp_path, tokenizer=str(tmp_path / "model")).bind(spec)


@dataclasses.dataclass(kw_only=True)
class Padding(ReaderSpec):
    """A target that takes token 0 for padding."""

    def padding_token(self) -> int:
        return 0


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("ends", "mask", "told"),
    [([0, 0, 0], None, True), ([0], None, False), ([7, 7, 7], None, False), ([0, 0, 0], 0, False)],
)
def test_padding_that_nothing_tells_from_text_is_said_to_count_as_text(
    ends: list[int],
    mask: int | None,
    told: bool,
    streaming: bool,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    lists = [[1 + n, 2, 3, 4, 5, *(ends if n % 3 else [])] for n in range(60)]
    rows = [
        {"ids": own} | ({} if mask is None else {"attention_mask": [int(t > 0) for t in own]})
        for own in lists
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = tokens(
        tmp_path / "a.jsonl", tmp_path, token_column="ids", length=8, pack=False, streaming=streaming
    )
    for batches in (source.bind(Padding()), source.bind_eval(Padding())):
        batches(KEY, torch.arange(2))
        notes = [note for note in batches.notes() if note.startswith("data.token_column: in many")]
        assert len(notes) == told
    assert caplog.text.count(
        "the padding token 0 stands several times in a row, and counts as text"
    ) == told * (2 if streaming else 1)
