"""Settings of a sweep in little room: keys cut to what tells them apart, and never one text for two."""

from collections.abc import Mapping, Sequence

from spd_hydra.report.numbers import clipped

LEAST_PARTS = 2  # of a key: `coeff` alone does not say of what
WHOLE_UP_TO = 72  # characters of a setting of several keys: clipped in the middle it would lose a value


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """For each key its shortest ending, of two parts or more, that no other of these keys has.

    `loss.importance_minimality.coeff` becomes `importance_minimality.coeff`.
    """
    return {key: _ending(key, [other for other in keys if other != key]) for key in keys}


def setting_text(setting: Sequence[tuple[str, str]], names: Mapping[str, str]) -> str:
    """The overrides whose keys have a name, under that name; empty where none has."""
    return " ".join(f"{names[key]}={value}" for key, value in setting if key in names)


def fitted(texts: Sequence[str], room: int, *, keys: int) -> list[str]:
    """The texts, clipped to the room where they are longer, and to more where two would become the same.

    Args:
        room: characters.
        keys: how many keys a text has; with several, texts of moderate length stay whole.
    """
    longest = max(map(len, texts), default=0)
    if keys > 1 and longest <= WHOLE_UP_TO:
        return list(texts)
    while room < longest and len({clipped(text, room) for text in texts}) < len(set(texts)):
        room += 1
    return [clipped(text, room) for text in texts]


def _ending(key: str, others: Sequence[str]) -> str:
    parts = key.split(".")
    for number in range(LEAST_PARTS, len(parts)):
        ending = ".".join(parts[-number:])
        if not any(f".{other}".endswith(f".{ending}") for other in others):
            return ending
    return key
