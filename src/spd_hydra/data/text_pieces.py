"""Text files in pieces that join to the files again, so that a share of one file can be held out."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

CONTINUES = "spd_hydra.continues"  # column: whether a piece goes on where the one before it ended
PIECE = 2000  # characters, at least, of a piece: as many as rows of a few hundred tokens
_FEW = 200  # pieces of a short text, so that its held-out share has some
_LONGEST = 10  # times as long may a piece be whose text has no blank line
_AT_ONCE = 1000  # pieces written at once
_VERSION = "1"  # raise it when the same files give other pieces: it names the cache of `datasets`


def piece_size(files: Iterable[Path]) -> int:
    """How many characters pieces of these files have at least."""
    return max(min(sum(file.stat().st_size for file in files) // _FEW, PIECE), 1)


def pieces(lines: Iterable[str], size: int) -> Iterator[str]:
    """Whole paragraphs of a text, together at least `size` characters; joined they are the text.

    Blank lines stand at the beginning of the piece behind them: tokenizers read them there as in running
    text, and at the end of a text otherwise. A text without blank lines is cut at ends of lines.

    Args:
        lines: of the text, with their line breaks.
        size: see `piece_size`.
    """
    piece, blank = "", ""
    for line in lines:
        if not line.strip():
            blank += line
            continue
        if len(piece) >= (size if blank else _LONGEST * size):
            broken = "" if blank else "\n"  # the break before a blank line goes with it
            yield piece.removesuffix("\n")
            piece, blank = "", broken + ("\n" + blank if blank else "")
        piece, blank = piece + blank + line, ""
    if piece or blank:
        yield piece + blank


@functools.cache
def _builder_class(size: int) -> Any:
    """A builder of `datasets` for text files whose rows are pieces."""
    import pyarrow  # type: ignore[import-untyped]  # noqa: PLC0415
    from datasets.packaged_modules.text.text import Text
    from datasets.utils.file_utils import xopen

    class TextPieces(Text):  # type: ignore[misc]
        def _generate_tables(self, base_files: Any, files_iterables: Any) -> Iterator[Any]:
            number = 0
            for file in itertools.chain.from_iterable(files_iterables):
                with xopen(file, encoding="utf-8") as text:
                    found, continues = pieces(text, size), False
                    while batch := list(itertools.islice(found, _AT_ONCE)):
                        flags = [continues, *[True] * (len(batch) - 1)]
                        yield (0, number), pyarrow.table({"text": batch, CONTINUES: flags})
                        number, continues = number + 1, True

    return TextPieces


def read_pieces(data_files: Any, size: int, split: str, *, streaming: bool = False) -> Any:
    """A split of text files, or a part of one, as a dataset of pieces.

    Args:
        data_files: by split, as `datasets` takes them.
        size: see `piece_size`.
        split: as `load_dataset` takes it.
        streaming: read them on the way.
    """
    name = f"{_VERSION}-{size}"
    builder = _builder_class(size)(dataset_name="text_pieces", hash=name, data_files=data_files)
    if streaming:
        return builder.as_streaming_dataset(split=split)
    builder.download_and_prepare()
    return builder.as_dataset(split=split)
