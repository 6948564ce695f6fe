"""Batches of token ids from a text that is read while training goes on, and kept nowhere."""

import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from spd_hydra import rng
from spd_hydra.data.base import Batches
from spd_hydra.data.packing import Document, Layout, Tally, repeats
from spd_hydra.data.padding import padding_note
from spd_hydra.data.tokenizing import decoded
from spd_hydra.section import ConfigError

logger = logging.getLogger(__name__)

OpenDocuments = Callable[[int], Iterator[Document]]
"""The documents of a text from its beginning, in an order of its own for each seed."""

_ROWS_AT_ONCE = 64


class StreamedBatches(Batches):
    """Place i of the stream is the i-th row of the text, which begins anew, in another order, where it ends.

    A resumed run reads the text again up to its place, and finds what it had only if the source gives the
    same text in the same order. Every rank reads everything and takes its rows.

    Args:
        layout: how documents become rows.
        documents: the text.
        remember: keep all rows in memory, for held-out rows that are asked for again and again.
        load_tokenizer: for `decode`.
        padding: ids that are told of where they stand many times in a row.
    """

    ordered = True

    def __init__(
        self,
        layout: Layout,
        documents: OpenDocuments,
        *,
        remember: bool,
        load_tokenizer: Callable[[], Any],
        padding: frozenset[int] = frozenset(),
    ) -> None:
        self.padded = not layout.pack
        self._layout, self._documents, self._remember = layout, documents, remember
        self._load_tokenizer = functools.cache(load_tokenizer)
        self._notes: dict[str, None] = {}
        self._padding = padding
        self._key: list[int] | None = None
        self._begin([])

    def _begin(self, key: list[int]) -> None:
        self._key = key
        self._stream = self._rows(key)
        self._seen: list[np.ndarray] = []  # rows from place `_first` on
        self._first = 0

    def _rows(self, key: list[int]) -> Iterator[np.ndarray]:
        """All rows, epoch after epoch."""
        for epoch in itertools.count():
            tally = Tally()
            documents = self._documents(rng.derived_seed(0, f"stream/{key}", epoch) % 2**32)
            for rows in self._layout.rows(documents, tally, at_once=_ROWS_AT_ONCE * self._layout.length):
                self._look_for_padding(rows)
                yield from rows
            if not tally.rows:
                part = "held out" if self._remember else "left to train on"
                raise ConfigError(self._layout.why_no_row(tally, part))
            if self._remember and epoch == 0:
                note = repeats(tally.rows, self._layout.length)
                self._notes[note] = None
                logger.warning(note)

    def _look_for_padding(self, rows: np.ndarray) -> None:
        """Among the first rows."""
        note = padding_note(rows, self._padding)
        self._padding = frozenset()
        if note is not None:
            self._notes[note] = None
            logger.warning(note)

    def __call__(
        self, key: Int32[Tensor, "2"], rows: Int32[Tensor, " batch"] | Int64[Tensor, " batch"]
    ) -> Int64[Tensor, "batch length"]:
        """Token ids at these places of the stream; -1 is padding."""
        if rows.is_meta:  # a check before the run: nothing is read for it
            return torch.empty(len(rows), self._layout.length, dtype=torch.int64, device=rows.device)
        places = rows.tolist()
        if key.tolist() != self._key or min(places) < self._first:
            self._begin(key.tolist())
            if min(places) > 0:
                logger.warning(
                    "data.streaming: reading %d rows again to go on where the run stopped; the next ones are "
                    "those of the run only if the source gives the same text in the same order",
                    min(places),
                )
        while self._first + len(self._seen) <= max(places):
            self._seen.append(next(self._stream))
            if not self._remember and self._first + len(self._seen) <= min(places):
                self._first, self._seen = self._first + len(self._seen), []
        tokens = np.stack([self._seen[place - self._first] for place in places]).astype(np.int64)
        if not self._remember:  # the next places are later ones
            self._seen, self._first = self._seen[max(places) + 1 - self._first :], max(places) + 1
        return torch.from_numpy(tokens).to(rows.device)

    def notes(self) -> list[str]:
        return list(self._notes)

    def decode(self, ids: Sequence[int]) -> list[str] | None:
        return decoded(self._load_tokenizer(), ids)
