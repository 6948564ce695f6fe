"""Where documents come from: the hub, local files, or a dataset that was saved to disk."""

import dataclasses
import functools
import re
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from spd_hydra.model.hub import COMMIT
from spd_hydra.section import ConfigError

_KINDS = {
    ".txt": "text",
    ".md": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
_PACKED = {".gz", ".zst", ".xz", ".bz2"}  # which datasets unpacks itself
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class TextUnit(Enum):
    """What one document of a text file is."""

    paragraph = "paragraph"
    line = "line"
    file = "file"


@dataclasses.dataclass(frozen=True)
class TextSource:
    """One split of a dataset that is known but not read yet.

    Attributes:
        identity: changes when its content does.
        where: for people.
        columns: names of its columns, each with whether it holds text.
        load: the whole split.
        stream: the split, read on the way.
        commit: on the hub; None: it is local.
    """

    identity: str
    where: str
    columns: Callable[[], dict[str, bool]]
    load: Callable[[], Any]
    stream: Callable[[], Any]
    commit: str | None = None


def find_source(
    name: str,
    config_name: str | None,
    revision: str | None,
    *,
    split: str,
    text_unit: TextUnit,
    key: str = "data.split",
) -> TextSource:
    """The source that a name stands for; `key` is what a message calls the split.

    Raises:
        ConfigError: there is none, or it cannot be reached.
    """
    path = Path(name).expanduser()
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        return _saved(path, split, key)
    files = _files(path)
    if files:
        return _local(files, split, text_unit, key)
    if path.exists() or not _HUB_ID.fullmatch(name) or any(letter in name for letter in "*?["):
        raise ConfigError(
            f"data.name: got {name}, where there is no file of {', '.join(_KINDS)} and no saved dataset; "
            "give the id of a dataset on the hub, a file, a folder, or a pattern"
        )
    return _on_hub(name, config_name, revision, split, key)


def _saved(path: Path, split: str, key: str) -> TextSource:
    from datasets import DatasetDict, load_from_disk

    try:
        dataset: Any = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"data.name: {path} cannot be read: {_first_line(error)}") from error
    if isinstance(dataset, DatasetDict):
        _require_split(key, split, list(dataset), str(path))
        dataset = dataset[split]
    elif split != "train":
        raise ConfigError(f"{key}: got {split}, but the dataset saved in {path} has no splits; leave it out")
    return TextSource(
        identity=f"saved {dataset._fingerprint}",
        where=str(path.absolute()),
        columns=lambda: _columns(dataset.features),
        load=lambda: dataset,
        stream=lambda: dataset.to_iterable_dataset(),
    )


def _files(path: Path) -> list[Path]:
    """The files that a path names, a folder holds, or a pattern matches, in a fixed order."""
    if path.is_file():
        return [path]
    anchor = Path(path.anchor)
    found = path.rglob("*") if path.is_dir() else anchor.glob(str(path.relative_to(anchor)))
    return sorted(file for file in found if file.is_file() and _kind(file) is not None)


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _PACKED:
        suffixes.pop()
    return _KINDS.get(suffixes[-1]) if suffixes else None


def _local(files: list[Path], split: str, text_unit: TextUnit, key: str) -> TextSource:
    kinds = {_kind(file): file for file in files}
    if len(kinds) > 1 or None in kinds:
        shown = ", ".join(str(file) for file in kinds.values())
        wanted = ", ".join(_KINDS)
        raise ConfigError(
            f"data.name: got files that are not of one kind ({shown}); name files of one of {wanted}"
        )
    kind = str(next(iter(kinds)))
    _require_split(key, split, ["train"], "what is read from files")
    if not any(file.stat().st_size for file in files):
        raise ConfigError(f"data.name: {_shortened([str(file) for file in files])} holds nothing")
    names = [str(file.absolute()) for file in files]
    arguments: dict[str, Any] = {"data_files": {"train": names}}
    if kind == "text":
        sample_by = "document" if text_unit is TextUnit.file else text_unit.value
        arguments["sample_by"] = sample_by

    def load(*, streaming: bool = False) -> Any:
        from datasets import load_dataset

        try:
            return load_dataset(kind, split=split, streaming=streaming, **arguments)
        except Exception as error:  # of several libraries, all about these files or this split
            raise ConfigError(
                f"data: split {split} of {_shortened(names)} cannot be read: {_first_line(error)}"
            ) from error

    def columns() -> dict[str, bool]:
        from datasets import load_dataset

        if kind == "text":
            return {"text": True}
        try:
            if kind == "csv":
                first = _first_row(files[0])
            else:
                first = next(iter(load_dataset(kind, split="train", streaming=True, **arguments)))
        except StopIteration:
            raise ConfigError(f"data.name: {_shortened(names)} holds nothing") from None
        except Exception as error:
            raise ConfigError(
                f"data.name: {_shortened(names)} cannot be read: {_first_line(error)}"
            ) from error
        return {name: isinstance(value, str) for name, value in first.items()}

    stats = [(name, Path(name).stat().st_size, Path(name).stat().st_mtime_ns) for name in names]
    return TextSource(
        identity=f"files {kind} {arguments.get('sample_by')} {split} {stats}",
        where=_shortened(names),
        columns=columns,
        load=load,
        stream=functools.partial(load, streaming=True),
    )


def _first_row(file: Path) -> dict[str, Any]:
    """Of a table of comma-separated values, which a stream that is given up would leave open."""
    import pandas

    return next(iter(pandas.read_csv(file, nrows=1).to_dict("records")))


def _on_hub(name: str, config_name: str | None, revision: str | None, split: str, key: str) -> TextSource:
    from datasets import load_dataset, load_dataset_builder

    try:
        builder = load_dataset_builder(name, config_name, revision=revision)
    except Exception as error:  # of several libraries
        raise _unreachable(name, error) from error
    commit = str(builder.hash) if COMMIT.fullmatch(str(builder.hash)) else None
    if revision is not None and COMMIT.fullmatch(revision) and commit != revision:
        raise ConfigError(  # offline, `datasets` takes what it has
            f"data.revision: got {revision}, but the cache holds {name} at {commit or 'no known commit'} and "
            "the hub cannot be asked; fetch it with `spd-run task=prefetch ...` where there is a network"
        )
    if builder.info.splits:
        _require_split(key, split, list(builder.info.splits), name)

    def load(*, streaming: bool = False) -> Any:
        try:
            return load_dataset(name, config_name, revision=revision, split=split, streaming=streaming)
        except Exception as error:
            raise _unreachable(name, error) from error

    def columns() -> dict[str, bool]:
        return _columns(builder.info.features or load(streaming=True).features or load().features)

    return TextSource(
        identity=f"hub {name} {builder.config.name} {builder.hash} {split}",
        where=str(builder.cache_dir),
        columns=columns,
        load=load,
        stream=functools.partial(load, streaming=True),
        commit=commit,
    )


def _unreachable(name: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"data.name: got {name}, which is no local file and cannot be had from the hub "
        f"({_first_line(error)}); check the spelling; for a machine without a network fetch it with "
        "`spd-run task=prefetch ...` where there is one, with the same HF_HOME, and set HF_HUB_OFFLINE=1"
    )


def _require_split(key: str, split: str, known: list[str], where: str) -> None:
    base = re.split(r"[\[+]", split)[0]
    if base not in known:
        raise ConfigError(f"{key}: got {split}, but {where} has {', '.join(map(str, known))}")


def _columns(features: Any) -> dict[str, bool]:
    from datasets import Value

    return {
        name: isinstance(feature, Value) and feature.dtype in {"string", "large_string"}
        for name, feature in features.items()
    }


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _shortened(names: list[str]) -> str:
    shown = names if len(names) <= 3 else [*names[:2], "…", names[-1]]
    return ", ".join(shown) + (f" ({len(names)} files)" if len(names) > 3 else "")
