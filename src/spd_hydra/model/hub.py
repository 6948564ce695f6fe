"""Files of a repository of Hugging Face, here or on its hub: without the network where that goes."""

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spd_hydra.section import ConfigError

CONFIG = ("config.json",)
# What transformers loads, and for an index the parts that it names; repositories hold other formats besides.
WEIGHTS = (*CONFIG, "model.safetensors", "model.safetensors.index.json")
TOKENIZER = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
    *("*.model", "chat_template*"),
)
CODE = ("*.py",)
NO_TOKENIZER = (
    "tokenizer; name one with data.tokenizer=<id or directory>, or data.token_column for data that are "
    "tokenised already"
)

COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
TIMEOUT = 5  # seconds for the first answer of the hub


class Keys(NamedTuple):
    """What the configuration calls a repository and its revision."""

    name: str
    revision: str


MODEL = Keys("model.name", "model.revision")


class _UnreachableError(Exception):
    """The hub gave no answer; the message says why."""


def is_local(name: str) -> bool:
    """Whether a name is that of a directory, which comes before an id on the hub."""
    return Path(name).expanduser().is_dir()


def whole_name(name: str) -> str:
    """A name that means the same from any directory: the whole path of a local one, an id as it is."""
    return str(Path(name).expanduser().absolute()) if is_local(name) else name


def is_offline() -> bool:
    """Whether the environment forbids to ask the hub."""
    from huggingface_hub import constants  # noqa: PLC0415

    return bool(constants.HF_HUB_OFFLINE)


def is_id(name: str) -> bool:
    """Whether a name could be an id on the hub."""
    return _HUB_ID.fullmatch(name) is not None


def directory(name: str, revision: str | None, files: Sequence[str], keys: Keys = MODEL) -> Path:
    """The directory with files of a repository: a local one, a snapshot in the cache, or one downloaded now.

    Args:
        name: a directory, or an id on the hub.
        revision: branch, tag or commit on the hub; None: `main`.
        files: patterns of those that are wanted, of a model with CONFIG; of a TOKENIZER one is enough.
        keys: what messages call the two.

    Raises:
        ConfigError: there is no such repository, it lacks what is needed, or the hub cannot be reached.
    """
    if is_local(name):
        if revision is not None:
            raise ConfigError(
                f"{keys.revision}: got {revision}, but {keys.name}={name} is a local directory, which has no "
                "revisions; leave it out"
            )
        local = Path(name).expanduser()
        _require_files(local, name, files, keys)
        return local
    if not is_id(name):
        raise ConfigError(
            f"{keys.name}: got {name}, which is no directory and no id of the hub such as gpt2 or owner/model"
        )
    found = _snapshot(name, revision)
    if found is not None and _missing(found, files) is None:
        return found
    from huggingface_hub import constants  # noqa: PLC0415

    try:
        return _fetch(name, revision, files, keys)
    except _UnreachableError as error:
        if is_offline():
            advice = "where there is a network and HF_HUB_OFFLINE is not set, with the same HF_HOME"
        else:
            advice = "where there is a network, then here with the same HF_HOME and HF_HUB_OFFLINE=1"
        raise ConfigError(
            f"{keys.name}: got {_at(name, revision)}, which is not in {constants.HF_HUB_CACHE}, and {error}; "
            f"fetch it with `spd-run task=prefetch ...` {advice}, or give a local directory"
        ) from error


def download(name: str, revision: str | None, files: Sequence[str], keys: Keys = MODEL) -> Path:
    """Fetch files from the hub into the cache of Hugging Face, where `directory` finds them.

    Raises:
        ConfigError: there is no such repository, it lacks what is needed, or the hub cannot be reached.
    """
    try:
        return _fetch(name, revision, files, keys)
    except _UnreachableError as error:
        advice = "unset it" if is_offline() else "fetch it on another machine, into the same HF_HOME"
        raise ConfigError(
            f"{keys.name}: got {_at(name, revision)}, which cannot be fetched: {error}; {advice}, or give a "
            "local directory"
        ) from error


def commit_of(name: str, found: Path) -> str | None:
    """The commit of which `directory` gave the files; None: the directory is a user's own."""
    return None if is_local(name) else found.name


def require_own_code(name: str, file: Path, key: str) -> None:
    """Refuse code of another repository, of which no commit was given.

    Args:
        name: of the repository.
        file: its JSON file that says where its classes are.
        key: what allowed its own code.

    Raises:
        ConfigError: names the other repository.
    """
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    classes: dict[str, Any] = told.get("auto_map") or {}
    places = [str(place) for own in classes.values() for place in (own if isinstance(own, list) else [own])]
    if others := sorted({place.partition("--")[0] for place in places if "--" in place}):
        raise ConfigError(
            f"{key}: got true, but the code of {name} lies in {', '.join(others)}, at no fixed commit; copy "
            "model and code into one repository"
        )


def _fetch(name: str, revision: str | None, files: Sequence[str], keys: Keys) -> Path:
    from huggingface_hub import HfApi, snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if is_offline():
        raise _UnreachableError("HF_HUB_OFFLINE=1 forbids to ask the hub")
    fetch = functools.partial(snapshot_download, name, ignore_patterns=["*/*"])  # none of its folders
    try:
        # Asked first because it has a time limit; the download would try again and again.
        HfApi().model_info(name, revision=revision, timeout=TIMEOUT)
        found = Path(fetch(revision=revision, allow_patterns=[*CONFIG, *files]))
        if "model.safetensors" in files and (parts := _parts(found)):
            fetch(revision=found.name, allow_patterns=parts)
    except GatedRepoError as error:
        raise ConfigError(
            f"{keys.name}: got {name}, which is open only to those who accepted its terms on the hub; do so, "
            "then log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except RevisionNotFoundError as error:
        raise ConfigError(
            f"{keys.revision}: got {revision}, which {name} does not have; give a branch, a tag or a commit"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{keys.name}: got {name}, which the hub does not have or does not show to you; check the "
            "spelling, or log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except Exception as error:  # of several libraries, all about the way to the hub
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise _UnreachableError(f"the hub cannot be reached from this machine ({reason})") from error
    _require_files(found, name, files, keys)
    return found


def _snapshot(name: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download  # noqa: PLC0415
    from huggingface_hub.errors import LocalEntryNotFoundError  # noqa: PLC0415

    try:  # no patterns: what it should hold is asked here, not of the list of all files in the repository
        return Path(snapshot_download(name, revision=revision, allow_patterns=[], local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _require_files(found: Path, name: str, files: Sequence[str], keys: Keys) -> None:
    if missing := _missing(found, files):
        raise ConfigError(f"{keys.name}: got {name}, which has no {missing}")


def _missing(found: Path, files: Sequence[str]) -> str | None:
    """What a directory lacks of the files that nobody can do without."""
    if "config.json" not in files:
        there = any(path for pattern in files for path in found.glob(pattern))
        return None if there else NO_TOKENIZER
    if not (found / "config.json").is_file():
        return "config.json: it is no model of transformers"
    if "model.safetensors" not in files or (found / "model.safetensors").is_file():
        return None
    if not (found / "model.safetensors.index.json").is_file():
        return "weights in the safetensors format; others are not read, since they can hold code"
    absent = [part for part in _parts(found) if not (found / part).is_file()]
    return absent[0] if absent else None


def _parts(found: Path) -> list[str]:
    """The files that hold the weights, where they are in several."""
    index = found / "model.safetensors.index.json"
    if (found / "model.safetensors").is_file() or not index.is_file():
        return []
    return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))


def _at(name: str, revision: str | None) -> str:
    return name if revision is None else f"{name} at {revision}"
