"""Text with mask tokens in it, as a masked language model was trained to fill them."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int32, Int64
from torch import Tensor

from spd_hydra import rng
from spd_hydra.data.base import Batches
from spd_hydra.section import ConfigError

USUAL = 0.15  # of BERT and most that followed it
NO_ANSWER = -100


class MaskedBatches(Batches):
    """A stream of tokens with a share of them replaced by the mask token, drawn by key and place.

    Padding and special tokens stay. The same places of the same stream are always masked alike.

    Args:
        inner: an ordered stream of token ids.
        fraction: chance of each token, in (0, 1).
        mask: id of the mask token.
        special: ids that are never replaced.
    """

    ordered = True

    def __init__(self, inner: Batches, *, fraction: float, mask: int, special: Sequence[int]) -> None:
        assert inner.ordered, "rows number the places of a stream, of which each is masked in its own way"
        self.padded = inner.padded
        self._inner, self.fraction, self._mask = inner, fraction, mask
        self._special = sorted(special)  # no tensor: this may be made on meta, for a check, and then read

    def __call__(
        self, key: Int32[Tensor, "2"], rows: Int32[Tensor, " batch"] | Int64[Tensor, " batch"]
    ) -> Int64[Tensor, "batch length"]:
        """Token ids at these places of the stream, some of them the mask token; -1 is padding."""
        tokens = self._inner(key, rows)
        if tokens.is_meta:
            return tokens
        return torch.where(self._hidden(key, rows, tokens), self._mask, tokens)

    def answers(self, key: Int32[Tensor, "2"], rows: Tensor) -> Int64[Tensor, "batch length"]:
        """The tokens that mask tokens stand for, NO_ANSWER elsewhere."""
        tokens = self._inner(key, rows)
        return torch.where(self._hidden(key, rows, tokens), tokens, NO_ANSWER)

    def _hidden(self, key: Tensor, rows: Tensor, tokens: Tensor) -> Bool[Tensor, "batch length"]:
        columns = rng.columns("mask_tokens", tokens.shape[1]).to(tokens.device)
        drawn = rng.uniform(key.to(tokens.device), rows.to(torch.int32), columns)
        special = torch.tensor(self._special, dtype=tokens.dtype, device=tokens.device)
        fixed = (tokens < 0) | torch.isin(tokens, special)
        return (drawn < self.fraction) & ~fixed

    def content(self) -> str | None:
        """Digest of the rows and of how they are masked."""
        inner = self._inner.content()
        if inner is None:
            return None
        return hashlib.sha256(f"{inner} {self.fraction} {self._mask}".encode()).hexdigest()

    def decode(self, ids: Sequence[int]) -> list[str] | None:
        return self._inner.decode(ids)

    def notes(self) -> list[str]:
        """Adds: how much of the text is masked."""
        return [*self._inner.notes(), note(self.fraction)]


def note(fraction: float) -> str:
    """What a reader of a result has to know."""
    return (
        f"data.mask_fraction: {100 * fraction:g} % of the tokens are replaced by the mask token; "
        "cross-entropies are of these, the divergence of all"
    )


def masked(batches: Batches, fraction: float, tokenizer: Any, vocab_size: int) -> MaskedBatches:
    """The stream with the mask token of its tokenizer.

    Raises:
        ConfigError: there is no such token, or none of the target's.
    """
    mask = None if tokenizer is None else tokenizer.mask_token_id
    if mask is None or mask >= vocab_size:
        has = "there is no tokenizer for data that are tokens already"
        if mask is not None:
            has = f"the tokenizer's is {mask} and the target takes ids below {vocab_size}"
        elif tokenizer is not None:
            has = "the tokenizer has none"
        raise ConfigError(
            f"data.mask_fraction: got {fraction:g}, which needs a mask token, but {has}; name the target's "
            "tokenizer as data.tokenizer, or set data.mask_fraction=0"
        )
    return MaskedBatches(batches, fraction=fraction, mask=mask, special=tokenizer.all_special_ids)
