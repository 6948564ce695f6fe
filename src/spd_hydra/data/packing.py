"""Documents of token ids, written as the rows of a file: concatenated and cut, or one document a row."""

import contextlib
import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import Int

from spd_hydra.section import ConfigError

PADDING = -1
_CHUNK = 1 << 20  # tokens written at once

Document = Int[np.ndarray, " tokens"]
Rows = Int[np.ndarray, "rows length"]


class Continuation(np.ndarray):
    """Tokens of a document that goes on where the one before it in the text ended."""


@dataclasses.dataclass
class Tally:
    """Documents that have tokens, these tokens without the ends of documents, and rows made of them."""

    documents: int = 0
    tokens: int = 0
    rows: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """How documents become rows; those without tokens are left out.

    Attributes:
        length: tokens per row.
        pack: documents are concatenated, each with `begin` in front of it and `end` behind it, and cut into
            rows, of which the last, incomplete one is left out; else a row is the start of one document,
            filled up with -1.
        end: token behind every document when they are packed; None: nothing.
        vocab_size: ids must be below it.
        begin: tokens in front of every document when they are packed, unless it begins with them.
    """

    length: int
    pack: bool
    end: int | None
    vocab_size: int
    begin: tuple[int, ...] = ()

    @property
    def dtype(self) -> np.dtype[np.signedinteger | np.unsignedinteger]:
        """Of a file of rows: two bytes where they hold every id."""
        small = self.pack and self.vocab_size <= 1 << 16
        return np.dtype(np.uint16 if small else np.int32)

    def rows(
        self, documents: Iterable[Document], tally: Tally | None = None, *, at_once: int = _CHUNK
    ) -> Iterator[Rows]:
        """The rows of these documents, as many at a time as hold about `at_once` tokens.

        Args:
            documents: each of token ids.
            tally: counts what goes by.
            at_once: tokens.

        Raises:
            ConfigError: a token id is none of the target's.
        """
        tally = Tally() if tally is None else tally
        counted = self._counted(documents, tally)
        for rows in self._packed(counted, at_once) if self.pack else self._padded(counted, at_once):
            tally.rows += len(rows)
            yield rows

    def _counted(self, documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
        """Those that have tokens, all of which are the target's."""
        for document in documents:
            if not len(document):
                continue
            wrong = document[(document < 0) | (document >= self.vocab_size)]
            if len(wrong):
                raise ConfigError(
                    f"data: the text has the token id {wrong[0]}, but the target takes ids below "
                    f"{self.vocab_size}; choose the target's own tokenizer, "
                    "data.tokenizer=<name or directory>"
                )
            tally.documents += 1
            tally.tokens += len(document)
            yield document

    def why_no_row(self, tally: Tally, part: str, others: int = 0) -> str:
        """Why documents gave no row, for the user.

        Args:
            tally: of these documents.
            part: what became of them: `left to train on` or `held out`.
            others: documents of the same text that are in the other part.
        """
        if not tally.documents:
            none = f"data.eval_fraction: none of {others:,} documents" if others else "data: no document"
            return (
                f"{none} is {part}; take more text or another data.eval_fraction, of text files that are one "
                "document another data.text_unit, or name data to evaluate on, see data.eval_split"
            )
        documents = f"documents {part} (number: {tally.documents:,})"
        if not self.pack:
            return (
                f"data.pack: got false, but none of the {documents} has the two tokens that a row needs; "
                "take longer documents, see data.text_unit, or data.pack=true"
            )
        return (
            f"data.length: got {self.length}, but all {documents} have {tally.tokens:,} tokens together; "
            "take a smaller length, more text, or another data.eval_fraction"
        )

    def _packed(self, documents: Iterable[Document], at_once: int) -> Iterator[Rows]:
        begin = np.array(self.begin, dtype=np.int64)
        end = np.array([] if self.end is None else [self.end], dtype=np.int64)
        waiting: list[Document] = []
        n_waiting, behind = 0, end[:0]  # what ends the document before
        for document in documents:
            added: list[Document] = [document]
            if isinstance(document, Continuation):
                pass
            elif np.array_equal(document[: len(begin)], begin):
                added = [behind, document]
            else:
                added = [behind, begin, document]
            behind = end
            waiting += added
            n_waiting += sum(map(len, added))
            if n_waiting >= max(at_once, self.length):
                whole, rest = self._cut(waiting)
                yield whole
                waiting, n_waiting = [rest], len(rest)
        if n_waiting + len(behind) >= self.length:
            yield self._cut([*waiting, behind])[0]

    def _cut(self, parts: list[Document]) -> tuple[Rows, Document]:
        tokens = np.concatenate(parts)
        whole = len(tokens) // self.length * self.length
        return tokens[:whole].reshape(-1, self.length), tokens[whole:]

    def _padded(self, documents: Iterable[Document], at_once: int) -> Iterator[Rows]:
        rows: list[Document] = []
        for document in documents:
            if len(document) < 2:  # it has no next token
                continue
            row = np.full(self.length, PADDING, dtype=np.int64)
            row[: len(document)] = document[: self.length]
            rows.append(row)
            if len(rows) * self.length >= at_once:
                yield np.stack(rows)
                rows = []
        if rows:
            yield np.stack(rows)


def write_rows(path: Path, documents: Iterable[Document], layout: Layout) -> tuple[Tally, str]:
    """Write the rows of documents, one behind the other, and return when they are on the disk.

    Returns:
        How many there are, and the sha256 of their bytes.

    Raises:
        ConfigError: the file cannot be written, or a token id is none of the target's.
    """
    tally, digest = Tally(), hashlib.sha256()
    with writing(path):
        file = path.open("wb", buffering=0)  # closing a buffer would raise once more
    with file:
        for rows in layout.rows(documents, tally):
            rest = memoryview(rows.astype(layout.dtype).tobytes())
            digest.update(rest)
            with writing(path):
                while rest:
                    rest = rest[file.write(rest) :]
        with writing(path):
            os.fsync(file.fileno())
    return tally, digest.hexdigest()


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say of an error of the file system in the block that this place in the cache cannot be written.

    Raises:
        ConfigError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cache_dir: cannot write {path}: {error.strerror or error}; check that it is writable and has "
            "room, or choose another place with cache_dir=…"
        ) from error


def repeats(rows: int, length: int) -> str:
    """What to say when more held-out rows are asked for than there are."""
    return (
        f"data: only {rows:,} held-out rows of {length} tokens, and evaluations ask for more: rows are "
        "measured several times; hold out more (data.eval_fraction, data.eval_split), or lower eval.batches "
        "or eval.batch_size"
    )


def fingerprint(document: Document) -> int:
    """64 bits that tell a document from others."""
    data = np.ascontiguousarray(document, dtype=np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def chosen(documents: Iterable[Document], fits: Callable[[Document], bool]) -> Iterator[Document]:
    """The documents that fit; behind one that does not, what goes on with it stands alone."""
    is_gap = True
    for document in documents:
        if keeps := fits(document):
            yield document.view(np.ndarray) if is_gap else document
        is_gap = not keeps


def is_held_out(document: Document, fraction: float) -> bool:
    """Whether a document is among the held-out share: it follows from its tokens, so copies stay together."""
    return fingerprint(document) < fraction * 2.0**64
