"""A run that takes its model or data from the hub names the commit that it took, and keeps to it."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tests.data.reader import END, save_byte_tokenizer
from tests.hub_cache import COMMIT, cached_model
from tests.model.tiny_hf import VOCAB, saved_model, tokens

from spd_hydra import rng
from spd_hydra.api import decompose
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.data.base import Batches
from spd_hydra.data.tokens import Tokens
from spd_hydra.launcher.job import begin_or_go_on
from spd_hydra.model.hf import HuggingFace
from spd_hydra.model.weights import WeightsError
from spd_hydra.saved_config import load_config
from spd_hydra.saved_run import read_target
from spd_hydra.section import ConfigError
from spd_hydra.sources import pinned

NAME, LATER = "owner/model", "f" * 40
TOKENIZER = "owner/tokenizer"


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with a model and a dataset, on a machine without a network."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    saved_model("gpt2", tmp_path / "first")
    cached_model(folder, NAME, tmp_path / "first")
    cache_dataset(tmp_path / "datasets", COMMIT, list(range(4, VOCAB)))
    return folder


def cache_dataset(cache: Path, commit: str, ids: list[int]) -> None:
    """Leave what `datasets` leaves of a dataset on the hub: a folder by name, version and commit."""
    rows = cache.with_suffix(".jsonl")
    rows.write_text("\n".join(json.dumps({"ids": ids[n:] + ids[:n]}) for n in range(30)))
    made = datasets.load_dataset(
        "json", data_files={"train": str(rows)}, cache_dir=str(cache / "scratch"), split="train"
    )
    made_in = Path(made.cache_files[0]["filename"]).parent
    place = cache / "owner___texts" / "default" / "0.0.0" / commit
    place.mkdir(parents=True)
    for file in made_in.iterdir():
        shutil.copy(file, place / file.name.replace("json-", "texts-"))
    shutil.rmtree(cache / "scratch")


def model_moves_on(tmp_path: Path, hub: Path) -> None:
    """Let main of the model be another commit, with other weights."""
    changed = saved_model("gpt2", tmp_path / "second")
    with torch.no_grad():
        changed.get_parameter("transformer.wpe.weight").add_(1)
    changed.save_pretrained(tmp_path / "second")
    cached_model(hub, NAME, tmp_path / "second", commit=LATER)


def words_of(tmp_path: Path) -> list[str]:
    return [
        *("experiment=lm_hf", "task=train_target", "device=cpu", f"out_dir={tmp_path / 'runs'}"),
        *(f"model.name={NAME}", "model.keep_weights=never", "data.name=owner/texts"),
        *("data.token_column=ids", "data.length=12", f"data.cache_dir={tmp_path}"),
        "data.eval_fraction=0.5",
    ]


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    return compose([*words_of(tmp_path), *overrides])


def test_a_run_builds_from_its_commit_when_the_branch_has_moved_on(tmp_path: Path, hub: Path) -> None:
    config, place = config_of(tmp_path), tmp_path / "runs" / "0"
    output = config.model.build(rng.generator(0, "unused"))(tokens())
    begin_or_go_on(config, str(place), None)
    saved = load_config(place / "config.yaml")
    assert isinstance(saved.model, HuggingFace)
    assert isinstance(saved.data, Tokens)
    assert (saved.model.revision, saved.data.revision) == (COMMIT, COMMIT)
    model_moves_on(tmp_path, hub)
    assert not torch.equal(config.model.build(rng.generator(0, "unused"))(tokens()), output)
    module = read_target(saved, place, torch.device("cpu")).module
    assert torch.equal(module(tokens()), output)
    begin_or_go_on(config, str(place), None)  # as after a requeue
    assert load_config(place / "config.yaml") == saved


def test_a_run_that_begins_with_another_one_has_its_target_and_names_its_commit(
    tmp_path: Path, hub: Path
) -> None:
    small = [
        *("task=decompose", "decomposition.C=3", "ci_fn=mlp", "ci_fn.hidden=2", "train.restarts.number=1"),
        *("train.batch_size=4", "train.compile=false", "train.faithfulness_warmup.steps=1", "eval.batches=1"),
        *("eval.batch_size=4", "eval.figures=false", "eval.subcomponents=0", f"cache_dir={tmp_path / 'c'}"),
    ]
    first = decompose([*words_of(tmp_path), *small, "train.steps=2"])
    model_moves_on(tmp_path, hub)
    branch = decompose([*words_of(tmp_path), *small, "train.steps=4", f"start_from={first.path}"])
    saved = branch.config.model
    assert isinstance(saved, HuggingFace)
    assert saved.revision == COMMIT
    assert torch.equal(branch.model(tokens()), first.model(tokens()))  # its weights are not in the directory
    with pytest.raises(ConfigError, match=rf"model\.revision: {COMMIT} → {LATER}"):
        decompose(
            [
                *words_of(tmp_path),
                *small,
                "train.steps=4",
                f"start_from={first.path}",
                f"model.revision={LATER}",
            ]
        )
    further = decompose([f"resume={branch.path}", "train.steps=6"])
    assert further.summary["steps"] == 6


def test_a_branch_that_was_given_is_that_of_the_beginning_and_another_commit_is_refused(
    tmp_path: Path, hub: Path
) -> None:
    place = str(tmp_path / "runs" / "0")
    begin_or_go_on(config_of(tmp_path), place, None)
    model_moves_on(tmp_path, hub)
    begin_or_go_on(config_of(tmp_path, "model.revision=main"), place, None)
    with pytest.raises(WeightsError, match="written for other weights of the target than those"):
        begin_or_go_on(config_of(tmp_path, f"model.revision={LATER}"), place, None)
    begin_or_go_on(config_of(tmp_path), place, None)  # it has not forgotten what it began with


def test_a_commit_that_was_given_is_kept(tmp_path: Path, hub: Path) -> None:
    model_moves_on(tmp_path, hub)
    given = config_of(tmp_path, f"model.revision={COMMIT}")
    assert pinned(given).model == given.model
    found = pinned(config_of(tmp_path)).model
    assert isinstance(found, HuggingFace)
    assert found.revision == LATER


def test_what_is_local_has_no_commit(tmp_path: Path, hub: Path) -> None:
    config = config_of(tmp_path, f"model.name={tmp_path / 'first'}")
    assert pinned(config).model == config.model
    snapshot = hub / "models--owner--model" / "snapshots" / COMMIT
    assert snapshot.is_dir()  # which is named by its path here
    config = config_of(tmp_path, f"model.name={snapshot}")
    assert pinned(config).model == config.model
    toy = compose(["experiment=tms_5-2"])
    assert pinned(toy) == toy


def first_batch(config: RunConfig) -> Any:
    batches: Batches = config.data.bind(config.model)
    return batches(rng.key(0, "any"), torch.arange(2, dtype=torch.int32))


def test_data_of_the_commit_are_the_same_data(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    assert torch.equal(first_batch(pinned(config)), first_batch(config))


def test_data_of_another_commit_are_not_taken_for_those_of_the_run(tmp_path: Path) -> None:
    config = pinned(config_of(tmp_path))
    shutil.rmtree(tmp_path / "datasets" / "owner___texts")
    cache_dataset(tmp_path / "datasets", LATER, list(range(VOCAB - 1, 3, -1)))
    with pytest.raises(ConfigError) as caught:
        config.data.bind(config.model)
    assert str(caught.value) == (
        f"data.revision: got {COMMIT}, but the cache holds owner/texts at {LATER} and the hub cannot be "
        "asked; fetch it with `spd-run task=prefetch ...` where there is a network"
    )


def test_the_tokenizer_is_of_the_model_s_revision(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, other = (hub / f"models--owner--{name}" for name in ("model", "tokenizer"))
    model_moves_on(tmp_path, hub)
    cache_tokenizer(tmp_path, hub, COMMIT, end="<first>")
    cache_tokenizer(tmp_path, hub, LATER, end="<later>")
    (other / "refs" / "v1").write_text(COMMIT)
    for commit in (COMMIT, LATER):
        (model / "snapshots" / commit / "tokenizer.json").write_text("{}")
    asked: list[Path] = []

    def from_pretrained(name: str, *, trust_remote_code: bool) -> None:
        assert not trust_remote_code
        asked.append(Path(name))
        raise OSError("not there")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    text = tmp_path / "text.txt"
    text.write_text("some text")
    named = f"data.tokenizer={TOKENIZER}"
    for words in ([], [f"model.revision={COMMIT}"], [named], [named, "data.tokenizer_revision=v1"]):
        config = config_of(tmp_path, *words, f"data.name={text}", "data.token_column=null")
        with pytest.raises(
            ConfigError, match=r"^data\.tokenizer: got owner/.* cannot be loaded from .*: not"
        ):
            config.data.bind(config.model)
    assert [path.parent.parent for path in asked] == [model, model, other, other]
    assert [path.name for path in asked] == [LATER, COMMIT, LATER, COMMIT]


# ---- local names ---------------------------------------------------------------------------------------


def test_what_is_local_is_saved_with_its_whole_path(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in ("gpt2", "tokens"):
        saved_model("gpt2", tmp_path / "here" / folder)
        save_byte_tokenizer(tmp_path / "here" / folder)
    (tmp_path / "here" / "a.txt").write_text("A\n\nB")
    (tmp_path / "here" / "held_out.md").write_text("C\n\nD")
    monkeypatch.chdir(tmp_path / "here")
    names = ["model.name=gpt2", "data.name='*.txt'", "data.eval_name=held_out.md", "data.tokenizer=tokens"]
    config = config_of(tmp_path, *names, "data.token_column=null", "data.pack=false")
    begin_or_go_on(config, "../runs/0", None)
    monkeypatch.chdir(tmp_path)
    saved = load_config(tmp_path / "runs" / "0" / "config.yaml")
    assert isinstance(saved.model, HuggingFace)
    assert isinstance(saved.data, Tokens)
    assert saved.model.name == str(tmp_path / "here" / "gpt2")
    assert saved.data.name == str(tmp_path / "here" / "*.txt")
    assert saved.data.eval_name == str(tmp_path / "here" / "held_out.md")
    assert saved.data.tokenizer == str(tmp_path / "here" / "tokens")
    assert read_target(saved, tmp_path / "runs" / "0", torch.device("cpu")).module(tokens()).shape[0] == 3
    monkeypatch.chdir(tmp_path / "here")
    begin_or_go_on(config, "../runs/0", None)  # as after a requeue
    assert load_config(tmp_path / "runs" / "0" / "config.yaml") == saved


def test_an_id_on_the_hub_is_no_path_though_a_file_is_called_so(
    tmp_path: Path, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "model").write_text("notes")
    monkeypatch.chdir(tmp_path)
    found = pinned(config_of(tmp_path))
    assert isinstance(found.model, HuggingFace)
    assert isinstance(found.data, Tokens)
    assert (found.model.name, found.model.revision, found.data.name) == (NAME, COMMIT, "owner/texts")


# ---- a tokenizer of its own ----------------------------------------------------------------------------


def cache_tokenizer(tmp_path: Path, hub: Path, commit: str, *, end: str) -> None:
    """Let main of the tokenizer be at a commit, where the end of a text is called so."""
    files = save_byte_tokenizer(tmp_path / f"tokenizer of {commit}")
    for file in files.iterdir():
        file.write_text(file.read_text().replace("<end>", end))
    (files / "config.json").write_text("{}")  # offline, transformers does without it only if it was asked for
    cached_model(hub, TOKENIZER, files, commit=commit)


def with_tokenizer(tmp_path: Path, *overrides: str) -> RunConfig:
    """Of text that is already token ids, as the target has fewer than the tokenizer, which shows it."""
    words = ["model.revision=main", f"data.tokenizer={TOKENIZER}", "data.pack=false"]
    return config_of(tmp_path, *words, *overrides)


def end_of(config: RunConfig) -> list[str] | None:
    return config.data.bind(config.model).decode([END])


def test_a_run_reads_with_its_tokenizer_when_that_has_moved_on(tmp_path: Path, hub: Path) -> None:
    cache_tokenizer(tmp_path, hub, COMMIT, end="<first>")
    config, place = with_tokenizer(tmp_path), tmp_path / "runs" / "0"
    begin_or_go_on(config, str(place), None)
    saved = load_config(place / "config.yaml")
    assert isinstance(saved.data, Tokens)
    assert (saved.data.tokenizer, saved.data.tokenizer_revision) == (TOKENIZER, COMMIT)
    cache_tokenizer(tmp_path, hub, LATER, end="<later>")
    assert end_of(saved) == ["<first>"]
    begin_or_go_on(config, str(place), None)  # as after a requeue
    assert load_config(place / "config.yaml") == saved
    later = pinned(config).data
    assert isinstance(later, Tokens)
    assert later.tokenizer_revision == LATER


def test_a_tokenizer_of_a_given_commit_is_kept(tmp_path: Path, hub: Path) -> None:
    cache_tokenizer(tmp_path, hub, COMMIT, end="<first>")
    cache_tokenizer(tmp_path, hub, LATER, end="<later>")
    given = pinned(with_tokenizer(tmp_path, f"data.tokenizer_revision={COMMIT}"))
    assert isinstance(given.data, Tokens)
    assert given.data.tokenizer_revision == COMMIT
    assert end_of(given) == ["<first>"]


def test_a_tokenizer_in_a_directory_has_no_commit(tmp_path: Path) -> None:
    directory = save_byte_tokenizer(tmp_path / "here")
    found = pinned(config_of(tmp_path, f"data.tokenizer={directory}")).data
    assert isinstance(found, Tokens)
    assert found.tokenizer_revision is None
    with pytest.raises(ConfigError, match=r"^data\.tokenizer_revision: got v1, but .*here is a local dir"):
        end_of(config_of(tmp_path, f"data.tokenizer={directory}", "data.tokenizer_revision=v1"))


def test_a_tokenizer_of_a_commit_that_is_not_there_is_named_with_it(tmp_path: Path, hub: Path) -> None:
    cache_tokenizer(tmp_path, hub, COMMIT, end="<first>")
    config = with_tokenizer(tmp_path, f"data.tokenizer_revision={LATER}", "data.pack=true")
    with pytest.raises(ConfigError, match=rf"^data\.tokenizer: got {TOKENIZER} at {LATER}, which is not in"):
        config.data.bind(config.model)


def test_a_revision_of_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.tokenizer_revision: got v1 without data\.tokenizer; name"):
        config_of(tmp_path, "data.tokenizer_revision=v1")
