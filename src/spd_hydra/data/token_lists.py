"""Lists of token ids that a dataset holds already: which of them are text, and what is refused."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from spd_hydra.data.packing import Continuation, Document
from spd_hydra.section import ConfigError

MASK = "attention_mask"  # what tokenizers call the column that says what they filled up
_AT_ONCE = 1000  # documents read at once


def mask_among(columns: Iterable[str], column: str) -> str | None:
    """The column that is 0 where the lists of another one are padding; None: they have none."""
    return MASK if column != MASK and MASK in columns else None


def read_lists(dataset: Any, column: str, continues: str | None = None) -> Iterator[Document]:
    """The lists of a column of a dataset that is on the disk; a null is a list without tokens.

    Args:
        dataset: of the library `datasets`.
        column: of the lists.
        continues: says of each list whether it goes on where the one before it ended, if there is such a
            column; None: none does.
    """
    names = [column, *({continues} & set(dataset.column_names))]
    for table in dataset.select_columns(names).with_format("arrow").iter(_AT_ONCE):
        flags = table[names[-1]].to_pylist() if len(names) > 1 else itertools.repeat(False)
        yield from (
            tokens.view(Continuation) if goes_on else tokens
            for tokens, goes_on in zip(_lists(table[column], column), flags, strict=False)
        )


def _lists(values: Any, column: str) -> Iterator[Document]:
    for chunk in values.chunks:
        flat = chunk.flatten()
        if flat.null_count:
            raise null_among(column)
        tokens = flat.to_numpy(zero_copy_only=False)
        lengths = chunk.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        for first, last in itertools.pairwise(np.concatenate([[0], lengths.cumsum()])):
            yield np.asarray(tokens[first:last])


def read_texts(dataset: Any, column: str, mask: str | None) -> Iterator[Document]:
    """The same without padding, which a column tells from tokens; see `texts`."""
    masks = None if mask is None else _values(dataset, mask)
    return texts(read_lists(dataset, column), masks, column, in_order=True)


def texts(
    lists: Iterable[Document], masks: Iterable[Any] | None, column: str, *, in_order: bool
) -> Iterator[Document]:
    """The tokens of a text in each list, without padding.

    Args:
        lists: of token ids.
        masks: for each list, where its tokens are (1) and where padding (0); None: nothing is said of it.
        column: of the lists.
        in_order: the lists come as they are numbered in the data.

    Raises:
        ConfigError: a mask does not fit its list, or an id is negative.
    """
    with_masks = zip(lists, itertools.repeat(None) if masks is None else masks, strict=False)
    for number, (ids, mask) in enumerate(with_masks):
        row = f"row {number} (counted from 0)" if in_order else "a row"
        real = ids if masks is None or not len(ids) else _without_padding(ids, mask, column, row)
        if (real < 0).any():
            raise ConfigError(
                f"data.token_column: got {column}, which holds the id {real[real < 0][0]} in {row}: negative "
                "ids are padding or labels to be ignored, and no tokens; leave them out of the lists, or "
                f"give the data a column {MASK} with 0 in their places, or name another column"
            )
        yield real


def null_among(column: str) -> ConfigError:
    """What is said of a list of token ids that holds a null."""
    return ConfigError(
        f"data.token_column: got {column}, where a list of token ids holds a null; leave such rows out, or "
        "name another column"
    )


def _values(dataset: Any, column: str) -> Iterator[Any]:
    """Row by row, whatever they are."""
    for table in dataset.select_columns(column).with_format("arrow").iter(_AT_ONCE):
        yield from table[column].to_pylist()


def _without_padding(ids: Document, mask: Any, column: str, row: str) -> Document:
    is_mask = isinstance(mask, list) and len(mask) == len(ids)
    if not is_mask or mask.count(0) + mask.count(1) != len(ids):  # which also counts false and true
        raise ConfigError(
            f"data.token_column: got {column}, beside which {MASK} has to say of every token id whether it "
            f"is text (1) or padding (0); in {row} it does not (number of ids: {len(ids)}); leave that "
            "column out of the data, or name another column of token ids"
        )
    real: Document = ids[np.array(mask, dtype=bool)]
    return real
