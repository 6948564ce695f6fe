"""What the columns of a dataset hold, and which of them is read where none is named."""

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any

from spd_hydra.section import ConfigError

_TOKEN_COLUMNS = ("input_ids", "tokens", "token_ids")  # what tokenizers and those who save tokens call them


class Holds(Enum):
    """What is in a column."""

    text = "text"
    whole_numbers = "lists of whole numbers"
    other = "something else"
    unknown = "something"


Columns = Mapping[str, Holds]


def columns_of(features: Mapping[str, Any]) -> dict[str, Holds]:
    """By the features of a dataset."""
    return {name: _holds(feature) for name, feature in features.items()}


def _holds(feature: Any) -> Holds:
    if getattr(feature, "dtype", None) in {"string", "large_string", "string_view"}:
        return Holds.text
    inner = str(getattr(getattr(feature, "feature", None), "dtype", ""))
    return Holds.whole_numbers if inner.startswith(("int", "uint")) else Holds.other


def columns_of_rows(rows: Iterable[Mapping[str, Any]]) -> dict[str, Holds]:
    """By the first value of each column that is text or token ids, else by one that is neither."""
    found: dict[str, Holds] = {}
    for row in rows:
        for name, value in row.items():
            known, own = found.setdefault(name, Holds.unknown), kind_of_value(value)
            if known is Holds.unknown or (known is Holds.other and own is not Holds.unknown):
                found[name] = own
    return found


def kind_of_value(value: Any) -> Holds:
    """What a column with this value holds; nulls and empty lists do not tell."""
    if isinstance(value, str):
        return Holds.text
    if value is None or value == []:
        return Holds.unknown
    are_ids = isinstance(value, list) and all(type(one) is int for one in value)
    return Holds.whole_numbers if are_ids else Holds.other


def token_column_among(columns: Columns) -> str | None:
    """The column of token ids of data without text; None: there is text, or neither.

    Raises:
        ConfigError: it does not follow from the names.
    """
    numbers = [name for name, holds in columns.items() if holds is Holds.whole_numbers]
    if Holds.text in columns.values() or not numbers:
        return None
    named = [name for name in numbers if name in _TOKEN_COLUMNS]
    if len(named) != 1:
        raise ConfigError(
            f"data.token_column: got null, and no column holds text; name the one with token ids of "
            f"{', '.join(numbers)}, which hold lists of whole numbers"
        )
    return named[0]
