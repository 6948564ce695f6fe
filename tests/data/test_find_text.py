"""Where a text is found: files and folders without a network, the hub, and what the cache has of it."""

import json
import logging
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.data.reader import ReaderSpec
from tests.data.test_tokens import TEXTS, WRITERS, all_documents, texts_of, tokens

from spd_hydra.data.library import without_network
from spd_hydra.data.tokens import Tokens
from spd_hydra.section import ConfigError

NEW = [f"another text {number}" for number in range(6)]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Hosts that were looked up, in an environment that forbids nothing; there is no network."""
    import datasets
    import huggingface_hub

    from spd_hydra.data import hub_text

    hosts: list[Any] = []

    def refuse(host: Any, *_: Any, **__: Any) -> Any:
        hosts.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: refuse(address))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    hub_text._asked.cache_clear()
    return hosts


def write_folder(folder: Path, **splits: list[str]) -> None:
    """As a clone of a dataset on the hub."""
    import datasets

    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("# Some texts\n")
    for split, texts in splits.items():
        file = folder / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_dict({"text": texts}).to_parquet(file)


def cache_dataset(cache: Path, folder: Path, texts: list[str], *configurations: str) -> None:
    """Leave in the cache what a dataset `some/texts` of the hub leaves there when it was read."""
    import datasets

    with without_network():
        datasets.Dataset.from_dict({"text": texts}).to_parquet(folder / "train.parquet")
        for name in configurations:
            builder = datasets.load_dataset_builder(
                *("parquet", name),
                data_files={"train": str(folder / "train.parquet")},
                cache_dir=str(folder / "made"),
            )
            builder.download_and_prepare()
            place = cache / "some___texts" / name / "0.0.0" / ("0" * 40)
            shutil.copytree(builder.cache_dir, place)
            (place / "parquet-train.arrow").rename(place / "texts-train.arrow")
            facts = json.loads((place / "dataset_info.json").read_text())
            facts |= {"config_name": name, "dataset_name": "texts"}
            (place / "dataset_info.json").write_text(json.dumps(facts))


@pytest.mark.parametrize("name", [*WRITERS, "a folder", "a stream"])
def test_local_data_are_read_without_a_look_at_the_network(
    name: str, spec: ReaderSpec, asked: list[Any], tmp_path: Path
) -> None:
    file = "a.jsonl" if name == "a stream" else name
    writers: dict[str, Callable[[Path], None]] = {
        **WRITERS,
        "a folder": lambda path: write_folder(path, train=TEXTS),
    }
    writers[file](tmp_path / file)
    source = tokens(tmp_path / file, tmp_path, streaming=name == "a stream", pack=False, length=30)
    assert source.commits() == {}
    assert set(texts_of(source.bind(spec), 5)) <= set(TEXTS)
    assert set(texts_of(source.bind_eval(spec), 2)) <= set(TEXTS)
    assert asked == []


def test_without_a_network_a_dataset_that_is_not_there_is_said_in_one_line_at_once(
    spec: ReaderSpec, asked: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from huggingface_hub.constants import HF_HOME

    with caplog.at_level(logging.INFO), pytest.raises(ConfigError) as caught:
        tokens("some/texts", tmp_path).bind(spec)
    said = str(caught.value)
    assert said.startswith(
        "data.name: got some/texts, which is no local file and cannot be had from the hub (ConnectError: "
    )
    assert said.endswith(
        "nor from the cache; check the spelling, or fetch it with `spd-run task=prefetch ...` on a machine "
        f"with a network and the same HF_HOME, which is {HF_HOME}, and set HF_HUB_OFFLINE=1 on this one"
    )
    assert "\n" not in said
    assert not caplog.text
    assert len(asked) <= 2  # for the dataset once, and once in a process for the user agent


def test_without_a_network_a_dataset_in_the_cache_is_read_from_there(
    spec: ReaderSpec, asked: list[Any], tmp_path: Path, datasets_cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache_dataset(datasets_cache, tmp_path, TEXTS, "default")
    source = tokens("some/texts", tmp_path, pack=False, length=30)
    with caplog.at_level(logging.INFO):
        assert all_documents(source, spec) == sorted(TEXTS)
    assert source.commits() == {"revision": "0" * 40}
    assert "some/texts is read from the cache; the hub cannot be asked: ConnectError" in caplog.text
    assert len(asked) <= 2


def test_splits_of_a_folder_are_told_by_its_names_and_what_describes_it_is_no_text(
    spec: ReaderSpec, tmp_path: Path
) -> None:
    write_folder(tmp_path / "clone", train=TEXTS, test=NEW)
    (tmp_path / "clone" / "dataset_infos.json").write_text("{}")
    source = tokens(tmp_path / "clone", tmp_path, eval_split="test", pack=False, length=30)
    assert sorted(texts_of(source.bind(spec), len(TEXTS))) == sorted(TEXTS)
    assert sorted(texts_of(source.bind_eval(spec), len(NEW))) == NEW
    with pytest.raises(ConfigError, match=r"^data\.split: got dev, but .*clone has train, test$"):
        tokens(tmp_path / "clone", tmp_path, split="dev").bind(spec)


def test_folders_named_as_splits_are_splits(spec: ReaderSpec, tmp_path: Path) -> None:
    for split, texts in (("train", TEXTS), ("test", NEW)):
        (tmp_path / "clone" / split).mkdir(parents=True)
        (tmp_path / "clone" / split / "0.txt").write_text("\n\n".join(texts))
    source = tokens(tmp_path / "clone", tmp_path, split="test", eval_split="train", pack=False, length=30)
    assert sorted(texts_of(source.bind(spec), len(NEW))) == NEW


def test_rows_follow_a_file_of_their_own_split_alone(spec: ReaderSpec, tmp_path: Path) -> None:
    write_folder(tmp_path / "clone", train=TEXTS, test=NEW)

    def digest() -> str:
        return tokens(tmp_path / "clone", tmp_path).bind(spec).digest  # type: ignore[attr-defined,no-any-return]

    before = digest()
    (tmp_path / "clone" / "data" / "test-00000-of-00001.parquet").touch()
    assert digest() == before
    (tmp_path / "clone" / "data" / "train-00000-of-00001.parquet").touch()
    assert digest() != before


def test_a_part_of_a_split_is_read_of_files_and_refused_of_a_saved_dataset(
    spec: ReaderSpec, tmp_path: Path
) -> None:
    write_folder(tmp_path / "clone", train=TEXTS, test=NEW)
    WRITERS["saved"](tmp_path / "saved")
    part = tokens(tmp_path / "clone", tmp_path, split="train[:30]", pack=False, length=30)
    assert all_documents(part, spec) == sorted(TEXTS[:30])
    with pytest.raises(
        ConfigError, match=r"^data\.split: got train\[:10\], but .* whole splits are read: train$"
    ):
        tokens(tmp_path / "saved", tmp_path, split="train[:10]").bind(spec)


def test_files_of_a_folder_that_are_in_no_split_are_named(
    spec: ReaderSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train-a.txt", "test-b.txt", "more.txt"):
        (tmp_path / name).write_text("\n\n".join(TEXTS))
    source = tokens(tmp_path, tmp_path)
    source.bind(spec)
    source.bind_eval(spec)
    (said,) = caplog.messages
    assert f"these are in none and are not read: {tmp_path / 'more.txt'}; a pattern such as" in said


def test_tables_of_another_kind_in_a_folder_are_refused(spec: ReaderSpec, tmp_path: Path) -> None:
    write_folder(tmp_path / "clone", train=TEXTS, test=NEW)
    WRITERS["a.csv"](tmp_path / "clone" / "a.csv")
    with pytest.raises(
        ConfigError, match=r"^data\.name: got files that are not of one kind \(.*parquet, .*csv"
    ):
        tokens(tmp_path / "clone", tmp_path).bind(spec)


def test_a_folder_of_markdown_is_text(spec: ReaderSpec, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.md").write_text("\n\n".join(TEXTS))
    source = tokens(tmp_path / "notes", tmp_path, pack=False, length=30)
    assert all_documents(source, spec) == sorted(TEXTS)


CARD = """---
configs:
- config_name: old
  data_files: data/train*
- config_name: new
  data_files: data/test*
---
"""


def test_of_several_configurations_those_there_are_are_named(spec: ReaderSpec, tmp_path: Path) -> None:
    write_folder(tmp_path / "clone", train=TEXTS, test=NEW)
    (tmp_path / "clone" / "README.md").write_text(CARD)
    for given, said in ((None, "null"), ("novel", "novel")):
        with pytest.raises(ConfigError) as caught:
            tokens(tmp_path / "clone", tmp_path, config_name=given).bind(spec)
        assert str(caught.value) == (
            f"data.config_name: got {said}, but {tmp_path / 'clone'} has the configurations old, new; name "
            "one of them"
        )
    source = tokens(tmp_path / "clone", tmp_path, config_name="new", pack=False, length=30)
    assert all_documents(source, spec) == NEW


def test_of_several_configurations_in_the_cache_those_there_are_are_named(
    spec: ReaderSpec, asked: list[Any], tmp_path: Path, datasets_cache: Path
) -> None:
    cache_dataset(datasets_cache, tmp_path, TEXTS, "old", "new")
    for given, said in ((None, "null"), ("novel", "novel")):
        with pytest.raises(
            ConfigError,
            match=rf"config_name: got {said}, but some/texts has the configurations (old, new|new, old)",
        ):
            tokens("some/texts", tmp_path, config_name=given).bind(spec)


def test_data_to_evaluate_on_may_be_files_of_their_own(
    spec: ReaderSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl")
    (tmp_path / "val.txt").write_text("\n\n".join([*NEW, TEXTS[3]]))
    source = tokens(
        tmp_path / "a.jsonl", tmp_path, eval_name=str(tmp_path / "val.txt"), pack=False, length=30
    )
    assert sorted(texts_of(source.bind(spec), len(TEXTS))) == sorted(TEXTS)
    assert sorted(texts_of(source.bind_eval(spec), len(NEW))) == NEW
    assert "1 of 7 held-out documents are also among those to train on" in caplog.text


def test_rows_follow_the_data_to_evaluate_on(spec: ReaderSpec, tmp_path: Path) -> None:
    names = []
    for number in range(2):
        names.append(str(tmp_path / f"{number}.txt"))
        Path(names[-1]).write_text("\n\n".join(NEW))
    WRITERS["a.txt"](tmp_path / "a.txt")
    found = [tokens(tmp_path / "a.txt", tmp_path, eval_name=name).bind(spec) for name in [*names, None]]
    assert len({batches.digest for batches in found}) == 3  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"eval_config_name": "a"},
            r"^data\.eval_config_name: got a without data\.eval_name; name one, or leave",
        ),
        (
            {"eval_revision": "a"},
            r"^data\.eval_revision: got a without data\.eval_name; name one, or leave it out",
        ),
        ({"eval_name": "/no/where.txt"}, r"^data\.eval_name: got /no/where\.txt, where there is no file of"),
        (
            {"eval_name": "clone"},
            r"^data\.eval_split: got null, but .*clone has train, test; name one of them$",
        ),
        (
            {"eval_name": "clone", "eval_split": "dev"},
            r"^data\.eval_split: got dev, but .*clone has train, test$",
        ),
        (
            {"eval_name": "b.csv"},
            r"^data\.eval_name: got .*b\.csv, without the column text, from which text is trained on; it has "
            r"words$",
        ),
        (
            {"eval_name": "c.csv"},
            r"^data\.eval_name: got .*c\.csv, with something else in the column text, from which text is",
        ),
    ],
)
def test_mistakes_about_the_data_to_evaluate_on_are_found_when_it_is_bound(
    changes: dict[str, Any], message: str, spec: ReaderSpec, tmp_path: Path
) -> None:
    write_folder(tmp_path / "clone", train=TEXTS, test=NEW)
    WRITERS["a.jsonl"](tmp_path / "a.jsonl")
    (tmp_path / "b.csv").write_text("words\na\n")
    (tmp_path / "c.csv").write_text("text\n1\n")
    if (tmp_path / str(changes.get("eval_name"))).exists():
        changes = changes | {"eval_name": str(tmp_path / changes["eval_name"])}
    with pytest.raises(ConfigError, match=message.replace(r"^data\.", r"^(data\.)?", 1)):
        tokens(tmp_path / "a.jsonl", tmp_path, **changes).bind(spec)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Tokens:
    """As the kind of file that the name says."""
    import datasets

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        datasets.Dataset.from_list(rows).to_csv(path)
    else:
        datasets.Dataset.from_list(rows).to_parquet(path)
    return tokens(path, path.parent, pack=False, length=30, eval_fraction=0.3)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".parquet"])
def test_text_is_found_below_rows_that_have_none(kind: str, spec: ReaderSpec, tmp_path: Path) -> None:
    rows = [{"id": n, "text": None if n < 5 else text} for n, text in enumerate(TEXTS)]
    assert all_documents(write_rows(tmp_path / f"a{kind}", rows), spec) == sorted(TEXTS[5:])


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("name", ["input_ids", "tokens", "token_ids"])
def test_the_only_column_that_is_called_as_token_ids_is_read_where_there_is_no_text(
    kind: str, name: str, tmp_path: Path
) -> None:
    rows = [{name: [97 + n % 26, 97 + n // 26, 33], "mask": [1, 1, 1]} for n in range(40)]
    source = write_rows(tmp_path / f"a{kind}", rows)
    assert all_documents(source, ReaderSpec()) == sorted("".join(map(chr, row[name])) for row in rows)


def test_which_column_holds_token_ids_is_asked_where_it_does_not_follow(tmp_path: Path) -> None:
    for names in (["ids", "labels"], ["input_ids", "tokens"]):
        source = write_rows(tmp_path / "a.jsonl", [{name: [1, 2] for name in names}] * 3)
        with pytest.raises(ConfigError) as caught:
            source.bind(ReaderSpec())
        assert str(caught.value) == (
            "data.token_column: got null, and no column holds text; name the one with token ids of "
            f"{', '.join(names)}, which hold lists of whole numbers"
        )


def test_text_is_preferred_to_token_ids(spec: ReaderSpec, tmp_path: Path) -> None:
    rows = [{"input_ids": [1, 2], "story": text} for text in TEXTS]
    assert all_documents(write_rows(tmp_path / "a.jsonl", rows), spec) == sorted(TEXTS)


def test_a_log_has_no_progress_bars_but_what_is_done_and_how_long_it_took(
    spec: ReaderSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    WRITERS["a.jsonl"](tmp_path / "a.jsonl")
    capsys.readouterr()
    with caplog.at_level(logging.INFO):
        texts_of(tokens(tmp_path / "a.jsonl", tmp_path, pack=False, length=30).bind(spec), 1)
    assert capsys.readouterr() == ("", "")
    first, last = caplog.messages
    assert first == f"tokenising: column text of 40 rows of {tmp_path / 'a.jsonl'}"
    assert last.startswith("40 rows of 30 tokens in ")
