"""Batches of token ids from rows in the cache, every row once per epoch."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from spd_hydra import rng
from spd_hydra.data.base import Batches
from spd_hydra.data.packing import repeats
from spd_hydra.data.padding import padding_note
from spd_hydra.data.token_store import HELD_OUT, TokenStore
from spd_hydra.data.tokenizing import decoded

logger = logging.getLogger(__name__)

_told: set[tuple[str, str]] = set()  # notes that this process has logged, with the digest of their rows

OpenStore = Callable[[], TokenStore]
LoadTokenizer = Callable[[], Any]


@dataclasses.dataclass(kw_only=True)
class TokenBatches(Batches):
    """The stream of one part of a text: every epoch its rows in another order, each exactly once.

    Place i of the stream belongs to epoch e = i // N and is row π_e(i mod N) of the N rows, where π_e is a
    permutation that follows from the key and e. So a run that is resumed, and a rank that takes its share of
    the places, need no state.

    Attributes:
        digest: of everything that the rows depend on.
        part: which of the rows.
        length: tokens per row.
        padded: whether rows may end in padding.

    Args:
        open_store: opens the rows.
        load_tokenizer: of the text.
        padding: ids that are told of where they stand many times in a row.
    """

    digest: str
    part: str
    length: int
    padded: bool
    open_store: dataclasses.InitVar[OpenStore]
    load_tokenizer: dataclasses.InitVar[LoadTokenizer]
    padding: dataclasses.InitVar[frozenset[int]] = frozenset()
    ordered = True

    def __post_init__(
        self, open_store: OpenStore, load_tokenizer: LoadTokenizer, padding: frozenset[int]
    ) -> None:
        self._padding = padding
        self._open = open_store
        self._store: TokenStore | None = None
        self._load_tokenizer = functools.cache(load_tokenizer)
        self._notes: list[str] = []
        self._rows: np.ndarray | None = None
        self._repeats = False

    def __call__(
        self, key: Int32[Tensor, "2"], rows: Int32[Tensor, " batch"] | Int64[Tensor, " batch"]
    ) -> Int64[Tensor, "batch length"]:
        """Token ids at these places of the stream; -1 is padding.

        Args:
            key: of the purpose.
            rows: places.
        """
        if rows.is_meta:  # a check before the run: nothing is read for it
            return torch.empty(len(rows), self.length, dtype=torch.int64, device=rows.device)
        if self._rows is None:
            self._rows = self._open_store().rows(self.part)
        number = len(self._rows)
        places = rows.cpu().long()
        if self.part == HELD_OUT and not self._repeats and int(places.max()) >= number:
            self._repeats = True
            logger.warning(repeats(number, self.length))
        found = rng.permuted(key.cpu(), places % number, number, places // number)
        tokens = np.asarray(self._rows[found.numpy()], dtype=np.int64)
        return torch.from_numpy(tokens).to(rows.device)

    def content(self) -> str:
        """Digest of the rows themselves, which are made if the cache lacks them.

        Unlike `digest` it is another one only where tokens are: not after a mere `touch` of a file.
        """
        return self._open_store().content(self.part)

    def _open_store(self) -> TokenStore:
        if self._store is None:
            self._store = self._open()
            note = padding_note(self._store.rows(self.part), self._padding)
            self._notes = [*self._store.notes(), *([] if note is None else [note])]
            self._tell()
        return self._store

    def _tell(self) -> None:
        """Log the notes, each once per process."""
        for note in self._notes:
            if (self.digest, note) not in _told:
                _told.add((self.digest, note))
                logger.warning(note)

    def notes(self) -> list[str]:
        if self._repeats and self._rows is not None:
            return [*self._notes, repeats(len(self._rows), self.length)]
        return list(self._notes)

    def tokenizer(self) -> Any:
        """The tokenizer of the text, if there is one."""
        return self._load_tokenizer()

    def decode(self, ids: Sequence[int]) -> list[str] | None:
        return decoded(self._load_tokenizer(), ids)
