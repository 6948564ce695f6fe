"""The rows of a text: kept in the cache, or read on the way."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from spd_hydra.data.library import quiet
from spd_hydra.data.packing import Document, Layout, is_held_out
from spd_hydra.data.streamed import StreamedBatches
from spd_hydra.data.text_source import TextSource
from spd_hydra.data.token_store import HELD_OUT, TRAIN, TokenStore, open_or_make, write_store
from spd_hydra.data.tokenizing import Reader

logger = logging.getLogger(__name__)

_SHUFFLED = 1000  # documents of a stream among which the next one is chosen


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Rows in the cache, and how to make them.

    Attributes:
        digest: of everything that they depend on.
        directory: of the cache, named by the digest.
        source: the text.
        held_out: another one to evaluate on; None: the share `eval_fraction` of the documents.
        reader: how documents are read.
        masks: columns of `source` and of `held_out` that tell padding from tokens, see `Reader.mask`.
        layout: how they become rows.
        eval_fraction: chosen by the documents' tokens.
    """

    digest: str
    directory: Path
    source: TextSource
    held_out: TextSource | None
    reader: Reader
    masks: tuple[str | None, str | None]
    layout: Layout
    eval_fraction: float

    def open(self) -> TokenStore:
        """The rows, made now if they are not there."""
        return open_or_make(self.directory, self._make)

    def streamed(self, part: str, padding: frozenset[int]) -> StreamedBatches:
        """The rows of a part as they come; held-out documents are left out of what is trained on by share.

        Args:
            part: to train on, or held out.
            padding: ids that are told of where they stand many times in a row.
        """
        source, mask = self.source, self.masks[0]
        if part == HELD_OUT and self.held_out is not None:
            source, mask = self.held_out, self.masks[1]

        def documents(seed: int) -> Iterator[Document]:
            stream = source.stream()
            if part == TRAIN:
                stream = stream.shuffle(seed=seed, buffer_size=_SHUFFLED)
            for one in self.reader.streamed(stream, source.where, mask):
                own = TRAIN if not is_held_out(one, self.eval_fraction) else HELD_OUT
                if self.held_out is not None or own == part:
                    yield one

        return StreamedBatches(
            self.layout,
            documents,
            remember=part == HELD_OUT,
            load_tokenizer=self.reader.tokenizer,
            padding=padding,
        )

    def _make(self, directory: Path) -> TokenStore:
        started = time.perf_counter()
        documents = self._documents(self.source, directory / "train.arrow")
        held_out = None if self.held_out is None else self._documents(self.held_out, directory / "eval.arrow")
        store = write_store(directory, self.layout, documents, held_out, self.eval_fraction)
        for path in directory.glob("*.arrow"):
            path.unlink()
        seconds = time.perf_counter() - started
        rows = sum(store.facts["rows"].values())
        logger.info("%s rows of %d tokens in %.1f s", f"{rows:,}", self.layout.length, seconds)
        return store

    def _documents(self, source: TextSource, cache_file: Path) -> Callable[[], Iterator[Document]]:
        dataset = source.load()
        doing = "reading token ids" if self.reader.tokenised else "tokenising"
        number, column = f"{len(dataset):,}", self.reader.column
        logger.info("%s: column %s of %s rows of %s", doing, column, number, source.where)
        if source.cut is not None:
            logger.info("data.text_unit: %s", source.cut)
        with quiet():
            return self.reader.documents(dataset, cache_file)
