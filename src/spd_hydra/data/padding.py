"""Padding among tokens that are taken as they are: told, since nothing says that it is no text."""

from collections.abc import Collection

import numpy as np
from jaxtyping import Int

_MANY = 0.1  # of the rows
_LOOKED_AT = 1000  # rows


def padding_note(rows: Int[np.ndarray, "rows length"], padding: Collection[int]) -> str | None:
    """What to say of rows that look padded: in many of them a padding token stands three times in a row.

    One may be the end of a text, which many tokenizers also take for padding, and two the end of one and the
    beginning of the next.

    Args:
        rows: of tokens, of which the first are looked at.
        padding: ids that the target or the tokenizer take for padding.
    """
    seen = rows[:_LOOKED_AT]
    for token in padding:
        is_padding = seen == token
        is_thrice = is_padding[:, 2:] & is_padding[:, 1:-1] & is_padding[:, :-2]
        share = float(is_thrice.any(axis=1).mean()) if len(seen) else 0.0
        if share >= _MANY:
            return (
                f"data.token_column: in many rows the padding token {token} stands several times in a row, "
                "and counts as text; give the data a column attention_mask with 0 in its places"
            )
    return None
