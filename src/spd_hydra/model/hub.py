"""Files of a model in a local directory or on the Hugging Face hub: without the network where that goes."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from spd_hydra.section import ConfigError

CONFIG = ("config.json",)
WEIGHTS = (*CONFIG, "*.safetensors", "*.safetensors.index.json")
TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "chat_template*"),
)
CODE = ("*.py",)

COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_TIMEOUT = 5  # seconds for the first answer of the hub


def model_directory(name: str, revision: str | None, files: Sequence[str]) -> Path:
    """The directory with a model's files: a local one, a snapshot in the cache, or one downloaded now.

    Args:
        name: a directory, or an id on the hub.
        revision: branch, tag or commit on the hub; None: `main`.
        files: patterns of the files that are wanted.

    Raises:
        ConfigError: there is no such model, it lacks what is needed, or the hub cannot be reached.
    """
    local = Path(name).expanduser()
    if local.is_dir():
        if revision is not None:
            raise ConfigError(
                f"model.revision: got {revision}, but model.name={name} is a local directory, which has no "
                "revisions; leave it out"
            )
        _require_files(local, name, files)
        return local
    if not _HUB_ID.fullmatch(name):
        raise ConfigError(
            f"model.name: got {name}, which is no directory and no id of the hub such as gpt2 or owner/model"
        )
    found = _cached(name, revision, files)
    return found if found is not None else download(name, revision, files)


def download(name: str, revision: str | None, files: Sequence[str]) -> Path:
    """Fetch files from the hub into the cache of Hugging Face, where `model_directory` finds them.

    Raises:
        ConfigError: there is no such model, it lacks what is needed, or the hub cannot be reached.
    """
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        # Asked first because it has a time limit; the download would try again and again.
        HfApi().model_info(name, revision=revision, timeout=_TIMEOUT)
        found = Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    except GatedRepoError as error:
        raise ConfigError(
            f"model.name: got {name}, which is open only to those who accepted its terms on the hub; do so, "
            "then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"model.revision: got {revision}, which {name} does not have; give a branch, a tag or a commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"model.name: got {name}, which the hub does not have or does not show to you; check the "
            "spelling, or log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except Exception as error:  # of several libraries, all about the way to the hub
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"model.name: got {name}, which is not in {HF_HUB_CACHE}, and the hub cannot be reached "
            f"({reason}); run `spd-run task=prefetch ...` with the same HF_HOME where there is a network, or "
            "give a local directory"
        ) from error
    _require_files(found, name, files)
    return found


def commit_of(directory: Path) -> str | None:
    """The commit of which `model_directory` gave the files; None: the directory is a user's own."""
    in_cache = directory.parent.name == "snapshots" and COMMIT.fullmatch(directory.name)
    return directory.name if in_cache else None


def commit_in_cache(name: str, revision: str | None) -> str | None:
    """The commit of which the cache of Hugging Face gives the files of a repository now, without a network.

    Args:
        name: a local path, which has no commit, or an id on the hub.
        revision: branch, tag or commit on the hub; None: `main`.
    """
    if Path(name).expanduser().exists():
        return None
    found = _snapshot(name, revision)
    return None if found is None else commit_of(found)


def _cached(name: str, revision: str | None, files: Sequence[str]) -> Path | None:
    """The snapshot in the cache, if it is whole."""
    found = _snapshot(name, revision)
    return None if found is None or _missing(found, files) else found


def _snapshot(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _require_files(directory: Path, name: str, files: Sequence[str]) -> None:
    if missing := _missing(directory, files):
        raise ConfigError(f"model.name: got {name}, which has no {missing}")


def _missing(directory: Path, files: Sequence[str]) -> str | None:
    """What a directory lacks of the files that a model cannot do without."""
    if not (directory / "config.json").is_file():
        return "config.json: it is no model of transformers"
    if "*.safetensors" not in files or (directory / "model.safetensors").is_file():
        return None
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return "weights in the safetensors format; others are not read, since they can hold code"
    parts = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    absent = sorted(part for part in parts if not (directory / part).is_file())
    return absent[0] if absent else None
