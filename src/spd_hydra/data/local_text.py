"""Text in local files and folders, and in datasets that were saved to disk."""

import functools
import glob
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spd_hydra.data.columns import Columns, Holds, columns_of, columns_of_rows
from spd_hydra.data.library import quiet, without_network
from spd_hydra.data.text_pieces import piece_size, read_pieces
from spd_hydra.data.text_source import (
    TextSource,
    TextUnit,
    Wanted,
    first_line,
    parts_of,
    shortened,
    wrong_configuration,
)
from spd_hydra.section import ConfigError

logger = logging.getLogger(__name__)

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".text": "text",
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
_PACKED = {".gz", ".zst", ".xz", ".bz2"}  # which datasets unpacks itself
_ROWS_LOOKED_AT = 1000
_CARD = "README.md"

Load = Callable[..., Any]
"""Of a library: `load_dataset` without what is always the same; takes split and streaming."""


def is_saved(path: Path) -> bool:
    """Whether a directory was written by `save_to_disk`."""
    return (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file()


def saved(path: Path, wanted: Wanted) -> TextSource:
    """A dataset that `datasets` saved to disk.

    Raises:
        ConfigError: it cannot be read, or has no such split.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        with quiet():
            dataset: Any = load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{wanted.key('name')}: {path} cannot be read: {first_line(error)}") from error
    if isinstance(dataset, DatasetDict):
        split = wanted.chosen(dataset, str(path))
        if split not in dataset:  # which the library cuts only while it reads files
            raise ConfigError(
                f"{wanted.split_key}: got {split}, but of a saved dataset only whole splits are read: "
                f"{', '.join(dataset)}"
            )
        dataset = dataset[split]
    elif wanted.split not in {None, "train"}:
        raise ConfigError(
            f"{wanted.split_key}: got {wanted.split}, but the dataset saved in {path} has no splits; "
            "leave it out"
        )
    return TextSource(
        identity=f"saved {dataset._fingerprint}",
        where=str(path.absolute()),
        columns=lambda: columns_of(dataset.features),
        load=lambda: dataset,
        stream=lambda: dataset.to_iterable_dataset(),
    )


def files_of(path: Path) -> list[Path]:
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
    return KINDS.get(suffixes[-1]) if suffixes else None


def of_files(files: Sequence[Path], wanted: Wanted) -> TextSource:
    """All of these files as one split, `train`.

    Raises:
        ConfigError: they are not of one kind, or hold nothing.
    """
    kind = _only_kind(files, wanted)
    split = wanted.chosen(["train"], "what is read from files")
    names = [glob.escape(str(file.absolute())) for file in files]  # which `datasets` takes for patterns
    if kind == "text" and _in_pieces(wanted):
        read = functools.partial(read_pieces, {"train": names}, piece_size(files))
        return _source(kind, files, split, wanted, read)
    arguments: dict[str, Any] = {"data_files": {"train": names}, **_sample_by(kind, wanted)}

    def load(**how: Any) -> Any:
        from datasets import load_dataset

        return load_dataset(kind, **how, **arguments)

    return _source(kind, files, split, wanted, load)


def of_folder(folder: Path, files: Sequence[Path], wanted: Wanted) -> TextSource:
    """A folder as `datasets` understands it: splits by the names of files and folders, or by its README.

    Args:
        folder: exists.
        files: of it, from `files_of`.
        wanted: of it.

    Raises:
        ConfigError: it has no such split or configuration, or files that would be left out in silence.
    """
    kinds = {_kind(file) for file in files if file.name != _CARD}
    if kinds <= {"text"} and not any(".txt" in file.suffixes for file in files):
        return of_files(files, wanted)  # of endings that are no text to `datasets`
    sample_by = _sample_by("text", wanted) if kinds <= {"text"} else {}
    path = str(folder.absolute())
    if glob.has_magic(path):
        raise ConfigError(
            f"{wanted.key('name')}: {folder} has one of * ? [ in its path, which `datasets` takes for a "
            "pattern; rename it, or name a file in it"
        )

    def whole(**how: Any) -> Any:
        from datasets import load_dataset

        return load_dataset(path, wanted.config_name, **how, **sample_by)

    from datasets import load_dataset_builder

    try:
        with quiet(), without_network():
            builder = load_dataset_builder(path, wanted.config_name, **sample_by)
    except Exception as error:  # of several libraries, all about this folder
        if (problem := wrong_configuration(wanted, error)) is not None:
            raise problem from error
        raise ConfigError(f"{wanted.key('name')}: {folder} cannot be read: {first_line(error)}") from error
    parts = {str(split): [Path(name) for name in names] for split, names in builder.config.data_files.items()}
    _require_nothing_left_out(folder, files, [file for part in parts.values() for file in part], wanted)
    split = wanted.chosen(parts, str(folder))
    own = [file for part, found in parts.items() if part in parts_of(split) for file in found]
    card = [folder / _CARD] if (folder / _CARD).is_file() else []
    kind = _only_kind(own, wanted)
    in_pieces = kind == "text" and _in_pieces(wanted)
    cut = functools.partial(read_pieces, builder.config.data_files, piece_size(own))
    return _source(kind, own, split, wanted, cut if in_pieces else whole, described_by=card)


def _require_nothing_left_out(
    folder: Path, files: Sequence[Path], taken: Sequence[Path], wanted: Wanted
) -> None:
    """Refuse tables of several kinds, and say which files are in no split; a README may choose among them."""
    from datasets.data_files import FILES_TO_IGNORE
    from huggingface_hub import metadata_load  # noqa: PLC0415

    card = folder / _CARD
    if card.is_file() and "configs" in (metadata_load(card) or {}):
        return
    known = {file.resolve() for file in taken}
    left = [file for file in files if file.resolve() not in known and file.name not in FILES_TO_IGNORE]
    kind = _only_kind(taken, wanted)
    others = [file for file in left if _kind(file) not in {kind, "text"}]
    if others:
        _only_kind([taken[0], others[0]], wanted)
    if same := [str(file) for file in left if _kind(file) == kind]:
        pattern = folder / "**" / f"*{Path(same[0]).suffix}"
        _warn_once(
            f"{wanted.key('name')}: the names of files in {folder} tell splits, and these are in none and "
            f"are not read: {shortened(same)}; a pattern such as {pattern} takes all"
        )


@functools.cache
def _warn_once(text: str) -> None:
    """A source is found several times on the way to a run."""
    logger.warning(text)


def _only_kind(files: Sequence[Path], wanted: Wanted) -> str:
    kinds = {_kind(file): file for file in files}
    if len(kinds) > 1 or None in kinds:
        shown = ", ".join(str(file) for file in kinds.values())
        what = "files that are not of one kind" if len(kinds) > 1 else "a file of a kind that is not read"
        raise ConfigError(
            f"{wanted.key('name')}: got {what} ({shown}); name files of one of {', '.join(KINDS)}"
        )
    return str(next(iter(kinds)))


def _in_pieces(wanted: Wanted) -> bool:
    """Whether paragraphs of a text file go on where the one before them ended."""
    return wanted.joined and wanted.text_unit is TextUnit.paragraph


def _cut(kind: str, files: Sequence[Path], wanted: Wanted) -> str | None:
    """Where a text file is cut, and what is lost there, for people."""
    if kind != "text":
        return None
    if _in_pieces(wanted):
        return (
            f"files are cut into pieces of whole paragraphs, {piece_size(files):,} characters or more, of "
            "which a share may be held out; texts end where a file ends or a piece is left out"
        )
    return {
        TextUnit.paragraph: "every paragraph is a text, without the blank lines around it",
        TextUnit.line: "every line is a text, without its line break",
        TextUnit.file: "every file is a text",
    }[wanted.text_unit]


def _sample_by(kind: str, wanted: Wanted) -> dict[str, str]:
    """What of a text file is a document, as `datasets` says it."""
    if kind != "text":
        return {}
    return {"sample_by": "document" if wanted.text_unit is TextUnit.file else wanted.text_unit.value}


def _source(
    kind: str,
    files: Sequence[Path],
    split: str,
    wanted: Wanted,
    read: Load,
    *,
    described_by: Sequence[Path] = (),
) -> TextSource:
    """The split of a text in files, which are read without a network; other files may describe them."""
    names = [str(file.absolute()) for file in files]
    if not any(file.stat().st_size for file in files):
        raise ConfigError(f"{wanted.key('name')}: {shortened(names)} holds nothing")

    @quiet()
    @without_network()
    def load(*, streaming: bool = False) -> Any:
        try:
            return read(split=split, streaming=streaming)
        except Exception as error:  # of several libraries, all about these files or this split
            raise ConfigError(
                f"data: split {split} of {shortened(names)} cannot be read: {first_line(error)}"
            ) from error

    @quiet()
    @without_network()
    def columns() -> Columns:
        if kind == "text":
            return {"text": Holds.text}
        try:
            if kind == "csv":
                return _columns_of_table(files[0])
            stream = read(split=parts_of(split)[0], streaming=True)
            found = columns_of(stream.features or {}) or columns_of_rows(stream.take(_ROWS_LOOKED_AT))
        except Exception as error:
            raise ConfigError(
                f"{wanted.key('name')}: {shortened(names)} cannot be read: {first_line(error)}"
            ) from error
        if not found:
            raise ConfigError(f"{wanted.key('name')}: {shortened(names)} holds nothing")
        return found

    stats = [
        (str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns)
        for file in (*files, *described_by)
    ]
    pieces = f"pieces of {piece_size(files)}" if kind == "text" and _in_pieces(wanted) else None
    unit = pieces or _sample_by(kind, wanted).get("sample_by")
    return TextSource(
        identity=f"files {kind} {unit} {split} {stats}",
        where=shortened(names),
        columns=columns,
        load=load,
        stream=functools.partial(load, streaming=True),
        cut=_cut(kind, files, wanted),
    )


def _columns_of_table(file: Path) -> Columns:
    """Of a table of comma-separated values, which a stream that is given up would leave open."""
    import pandas

    rows = pandas.read_csv(file, nrows=_ROWS_LOOKED_AT).to_dict("records")
    found = columns_of_rows(rows)
    if len(rows) < _ROWS_LOOKED_AT:
        return found
    # Where these rows are numbers or empty a later one may be text, and then all are.
    return {name: Holds.unknown if own is Holds.other else own for name, own in found.items()}
