"""Where the files of a model are found, and what is said where they are not."""

import json
import time
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from huggingface_hub.utils._paths import filter_repo_objects

from spd_hydra.model import hub
from spd_hydra.section import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face, where nothing forbids to ask the hub."""
    folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
    return folder


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub that cannot be reached, and whom it was asked for."""
    asked: list[str] = []

    def model_info(self: object, repo_id: str, **options: object) -> None:
        asked.append(repo_id)
        assert options["timeout"] == 5
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    return asked


def downloaded(cache: Path, name: str, *files: str) -> Path:
    """What a download leaves in the cache."""
    repo = cache / f"models--{name.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


def refused(name: str, revision: str | None = None, files: tuple[str, ...] = hub.WEIGHTS) -> str:
    with pytest.raises(ConfigError) as caught:
        hub.directory(name, revision, files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_local_directory_is_itself(tmp_path: Path, unreachable: list[str]) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_text("{}")
    assert hub.directory(str(tmp_path), None, hub.WEIGHTS) == tmp_path
    assert hub.commit_of(str(tmp_path), tmp_path) is None
    assert not unreachable


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_what_is_in_the_cache_needs_no_network(
    cache: Path, unreachable: list[str], revision: str | None
) -> None:
    snapshot = downloaded(cache, "owner/model", "config.json", "model.safetensors")
    assert hub.directory("owner/model", revision, hub.WEIGHTS) == snapshot
    assert hub.commit_of("owner/model", snapshot) == COMMIT
    assert not unreachable


def test_a_snapshot_is_whole_with_what_was_wanted_of_a_larger_repository(
    cache: Path, unreachable: list[str]
) -> None:
    snapshot = downloaded(cache, "owner/model", "config.json", "model.safetensors")
    listed = ("config.json", "model.safetensors", "README.md", "pytorch_model.bin")
    entry = TreeCacheEntry(size=2, blob_id="0" * 40, lfs_sha256=None, lfs_size=None, xet_hash=None)
    write_tree_cache(str(snapshot.parent.parent), COMMIT, dict.fromkeys(listed, entry))
    assert hub.directory("owner/model", None, hub.WEIGHTS) == snapshot
    assert not unreachable


def test_without_files_and_network_one_line_says_what_to_do_at_once(
    cache: Path, unreachable: list[str]
) -> None:
    started = time.perf_counter()
    assert refused("owner/model") == (
        f"model.name: got owner/model, which is not in {cache}, and the hub cannot be reached from this "
        "machine (ConnectionError: Name or service not known); fetch it with `spd-run task=prefetch ...` "
        "where there is a network, then here with the same HF_HOME and HF_HUB_OFFLINE=1, or give a local "
        "directory"
    )
    assert unreachable == ["owner/model"]
    assert time.perf_counter() - started < 5


def test_where_the_hub_must_not_be_asked_one_line_says_so(
    cache: Path, unreachable: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert refused("owner/model", "v2") == (
        f"model.name: got owner/model at v2, which is not in {cache}, and HF_HUB_OFFLINE=1 forbids to ask "
        "the hub; fetch it with `spd-run task=prefetch ...` where there is a network and HF_HUB_OFFLINE is "
        "not set, with the same HF_HOME, or give a local directory"
    )
    assert not unreachable


@pytest.mark.parametrize(
    ("forbidden", "why", "advice"),
    [
        (
            False,
            "the hub cannot be reached from this machine (ConnectionError: Name or service not known)",
            "fetch it on another machine, into the same HF_HOME",
        ),
        (True, "HF_HUB_OFFLINE=1 forbids to ask the hub", "unset it"),
    ],
)
def test_who_fetches_is_not_sent_to_fetch(
    unreachable: list[str], monkeypatch: pytest.MonkeyPatch, forbidden: bool, why: str, advice: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", forbidden)
    with pytest.raises(ConfigError) as caught:
        hub.download("nobody/nothing", None, hub.WEIGHTS)
    assert str(caught.value) == (
        f"model.name: got nobody/nothing, which cannot be fetched: {why}; {advice}, or give a local directory"
    )


def test_a_half_downloaded_model_is_not_taken(cache: Path, unreachable: list[str]) -> None:
    snapshot = downloaded(cache, "gpt2", "config.json")
    assert hub.directory("gpt2", None, hub.CONFIG) == snapshot
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1-of-2.safetensors").write_text("")
    assert "the hub cannot be reached" in refused("gpt2")
    (snapshot / "model-2-of-2.safetensors").write_text("")
    assert hub.directory("gpt2", None, hub.WEIGHTS) == snapshot


def test_a_directory_that_is_no_model_is_refused(tmp_path: Path) -> None:
    assert refused(str(tmp_path)) == (
        f"model.name: got {tmp_path}, which has no config.json: it is no model of transformers"
    )


def test_weights_that_can_hold_code_are_not_read(tmp_path: Path) -> None:
    for file in ("config.json", "pytorch_model.bin"):
        (tmp_path / file).write_text("{}")
    assert refused(str(tmp_path)) == (
        f"model.name: got {tmp_path}, which has no weights in the safetensors format; others are not read, "
        "since they can hold code"
    )


def test_a_local_directory_has_no_revisions(tmp_path: Path) -> None:
    assert refused(str(tmp_path), revision="main") == (
        f"model.revision: got main, but model.name={tmp_path} is a local directory, which has no revisions; "
        "leave it out"
    )


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "a/b/c", "two words"])
def test_what_is_neither_directory_nor_id_is_refused(name: str, unreachable: list[str]) -> None:
    assert refused(name) == (
        f"model.name: got {name}, which is no directory and no id of the hub such as gpt2 or owner/model"
    )
    assert not unreachable


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            "RepositoryNotFoundError",
            "model.name: got owner/model, which the hub does not have or does not show to you; check the "
            "spelling, or log in with `hf auth login` or set HF_TOKEN",
        ),
        (
            "RevisionNotFoundError",
            "model.revision: got v2, which owner/model does not have; give a branch, a tag or a commit",
        ),
        (
            "GatedRepoError",
            "model.name: got owner/model, which is open only to those who accepted its terms on the hub; do "
            "so, then log in with `hf auth login` or set HF_TOKEN",
        ),
    ],
)
def test_what_the_hub_answers_is_told_in_a_line(
    kind: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error_class = getattr(huggingface_hub.errors, kind)

    def model_info(self: object, repo_id: str, **options: object) -> None:
        raise error_class.__new__(error_class)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    assert refused("owner/model", revision="v2") == message


# ---- what is fetched of a repository


@pytest.fixture
def reachable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files of a repository on a hub that can be reached."""
    files = ["config.json", "README.md", "own.py", "tokenizer.json", "original/tokenizer.model"]

    def snapshot_download(
        name: str,
        *,
        revision: str | None,
        allow_patterns: list[str],
        ignore_patterns: list[str] | None = None,
        local_files_only: bool = False,
    ) -> str:
        repo = cache / f"models--{name.replace('/', '--')}"
        snapshot = repo / "snapshots" / COMMIT
        if local_files_only and not snapshot.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        wanted = filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns)
        for file in () if local_files_only else wanted:
            (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / file).write_text(INDEX if file.endswith("index.json") else "{}")
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **options: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return files


INDEX = json.dumps({"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}})
OTHER_WEIGHTS = [
    "consolidated.safetensors",
    "onnx/model.safetensors",
    "pytorch_model.bin",
    "model.fp16.safetensors",
]
PARTS = ["model-1-of-2.safetensors", "model-2-of-2.safetensors", "model.safetensors.index.json"]


@pytest.mark.parametrize(
    ("there", "fetched"),
    [
        (["model.safetensors"], ["model.safetensors"]),
        (PARTS, PARTS),
        ([*PARTS, "model.safetensors"], ["model.safetensors", "model.safetensors.index.json"]),
    ],
)
def test_of_all_weights_those_are_fetched_that_are_loaded(
    reachable: list[str], there: list[str], fetched: list[str]
) -> None:
    reachable += [*OTHER_WEIGHTS, *there]
    found = hub.directory("owner/model", None, hub.WEIGHTS)
    files = sorted(str(path.relative_to(found)) for path in found.rglob("*") if path.is_file())
    assert files == ["config.json", *fetched]


def test_a_tokenizer_is_fetched_where_only_its_model_was(reachable: list[str]) -> None:
    found = hub.directory("owner/model", None, hub.CONFIG)
    assert [path.name for path in found.iterdir()] == ["config.json"]
    assert hub.directory("owner/model", None, hub.TOKENIZER) == found
    assert sorted(path.name for path in found.iterdir()) == ["config.json", "tokenizer.json"]
    assert hub.directory("owner/model", None, (*hub.CONFIG, *hub.CODE)) == found  # a model may have none
