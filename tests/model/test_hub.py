"""Where the files of a model are found, and what is said where they are not."""

import json
import time
from pathlib import Path

import huggingface_hub
import pytest

from spd_hydra.model import hub
from spd_hydra.section import ConfigError

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hugging Face."""
    folder = tmp_path / "hub"
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
        hub.model_directory(name, revision, files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_local_directory_is_itself(tmp_path: Path, unreachable: list[str]) -> None:
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_text("{}")
    assert hub.model_directory(str(tmp_path), None, hub.WEIGHTS) == tmp_path
    assert hub.commit_of(tmp_path) is None
    assert not unreachable


@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_what_is_in_the_cache_needs_no_network(
    cache: Path, unreachable: list[str], revision: str | None
) -> None:
    snapshot = downloaded(cache, "owner/model", "config.json", "model.safetensors")
    assert hub.model_directory("owner/model", revision, hub.WEIGHTS) == snapshot
    assert hub.commit_of(snapshot) == COMMIT
    assert not unreachable


def test_without_files_and_network_one_line_says_what_to_do_at_once(
    cache: Path, unreachable: list[str]
) -> None:
    started = time.perf_counter()
    assert refused("owner/model") == (
        f"model.name: got owner/model, which is not in {cache}, and the hub cannot be reached "
        "(ConnectionError: Name or service not known); run `spd-run task=prefetch ...` with the same HF_HOME "
        "where there is a network, or give a local directory"
    )
    assert unreachable == ["owner/model"]
    assert time.perf_counter() - started < 5


def test_a_half_downloaded_model_is_not_taken(cache: Path, unreachable: list[str]) -> None:
    snapshot = downloaded(cache, "gpt2", "config.json")
    assert hub.model_directory("gpt2", None, hub.CONFIG) == snapshot
    index = {"weight_map": {"a": "model-1-of-2.safetensors", "b": "model-2-of-2.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (snapshot / "model-1-of-2.safetensors").write_text("")
    assert "the hub cannot be reached" in refused("gpt2")
    (snapshot / "model-2-of-2.safetensors").write_text("")
    assert hub.model_directory("gpt2", None, hub.WEIGHTS) == snapshot


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
