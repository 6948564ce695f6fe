"""What a target is given: one tensor, or what a tokenizer returns; and which of its positions are real."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from spd_hydra.model.hf_config import first_line
from spd_hydra.model.tokens_in import TokensIn
from spd_hydra.section import ConfigError


def as_batch(given: Tensor | Mapping[str, Any], target: nn.Module) -> Tensor:
    """The batch as one tensor.

    Args:
        given: a tensor, or a mapping with `input_ids` and `attention_mask`, `[batch, length]`, as a tokenizer
            returns it with `return_tensors="pt"`: where the mask is 0 tokens become -1, which is padding.
        target: what it is for.

    Raises:
        TypeError: it is something else.
        ValueError: a model of transformers takes no such shape, or not so many tokens.
    """
    batch = _of_tokenizer(given) if isinstance(given, Mapping) else given
    if not isinstance(batch, Tensor):
        raise TypeError(f"batch: got a {type(batch).__name__}, must be a tensor with one row per input")
    if isinstance(target, TokensIn):
        _require_tokens(batch, target)
        if isinstance(given, Mapping) and target.padded:
            _require_padding_that_does_not_count(batch, target)
    return batch


def _of_tokenizer(given: Mapping[str, Any]) -> Tensor:
    tokens, mask = given.get("input_ids"), given.get("attention_mask")
    if not isinstance(tokens, Tensor) or not (mask is None or isinstance(mask, Tensor)):
        kinds = ", ".join(f"{name}: {type(value).__name__}" for name, value in given.items())
        raise TypeError(
            f"batch: got a mapping of {kinds or 'nothing'}; its input_ids must be a tensor, as "
            'tokenizer(texts, return_tensors="pt", padding=True) gives them'
        )
    return tokens if mask is None else tokens.masked_fill(mask == 0, -1)


def _require_tokens(batch: Tensor, target: TokensIn) -> None:
    shape = list(batch.shape)
    if batch.is_floating_point() or batch.dim() != 2:
        dtype = str(batch.dtype).removeprefix("torch.")
        advice = "; for one text give tokens[None]" if batch.dim() == 1 else ""
        raise ValueError(f"batch: got shape {shape}, {dtype}, must be token ids, [batch, length]{advice}")
    if target.longest is not None and batch.shape[1] > target.longest:
        raise ValueError(
            f"batch: got rows of {batch.shape[1]} tokens, but the target takes at most {target.longest}; "
            "give fewer, or cut the text into rows"
        )


@torch.no_grad()
def _require_padding_that_does_not_count(batch: Tensor, target: TokensIn) -> None:
    """Refuse padding in front of a text where the target counts it as positions, as GPT-2 does."""
    begins_late = (batch[:, 0] < 0) & (batch >= 0).any(dim=1)
    if not begins_late.any():
        return
    row = batch[begins_late][:1]
    first = int((row >= 0).int().argmax())
    late, alone = target(row), target(row[:, first:])
    if late.shape[:2] == row.shape:  # an output for each position
        late = late[:, first:]
    if late.shape == alone.shape and not torch.allclose(
        late, alone, rtol=0.05, atol=0.05 * float(alone.abs().max())
    ):
        raise ValueError(
            f"batch: row {int(begins_late.int().argmax())} begins with padding, which the target counts as "
            'positions: its outputs are others than without; tokenise with padding_side="right"'
        )


@contextmanager
def told_of_batch(batch: Tensor, target: nn.Module) -> Iterator[None]:
    """Say of what the target raises which batch it does not take.

    Raises:
        ValueError: shape and type of the batch, and the target's own words.
    """
    if isinstance(target, TokensIn) and batch.numel() and not batch.is_meta:
        _require_known(batch, cast(Any, target).get_input_embeddings().num_embeddings)
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        what = f"shape {list(batch.shape)}, {str(batch.dtype).removeprefix('torch.')}"
        raise ValueError(f"batch: got {what}, which the target does not take: {first_line(error)}") from error


def _require_known(tokens: Tensor, vocabulary: int) -> None:
    # On a GPU the embedding itself would end the process's use of it.
    if (largest := int(tokens.max())) >= vocabulary:
        raise ValueError(
            f"batch: got token id {largest}, but the target takes ids below {vocabulary}; use its tokenizer"
        )


def real_positions(batch: Tensor, positions: torch.Size) -> Bool[Tensor, "*positions"] | None:
    """Which positions of token ids are no padding, where negative ids mark it; None: all are real.

    Raises:
        ValueError: there is no axis of positions, so the batch is one row without its axis.
    """
    if not positions:
        raise ValueError(
            f"batch: got shape {list(batch.shape)}, which has no axis of rows, must be [batch, …]; for a "
            "single input x give x[None]"
        )
    return batch >= 0 if batch.shape == positions and not batch.is_floating_point() else None
