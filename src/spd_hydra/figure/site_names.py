"""Names of sites where there is little room: short, and different for different sites."""

from collections.abc import Iterable, Sequence
from itertools import takewhile

from spd_hydra.figure.style import shortened

_SHORTEST = 3  # characters that a part of a name is cut to


def site_labels(names: Iterable[str], limit: int) -> dict[str, str]:
    """A label for each site of a figure, of at most `limit` characters where that tells the sites apart.

    Names that all fit stay as they are. Else they lose the parts that all begin with; if that is not enough,
    what stands between the first part and the first number; then parts are cut in their middle, the longest
    first, and those with a digit, which number the blocks, only when no others are left. Where two labels
    would be the same, all get more room.

    Args:
        names: of all sites that the figure names.
        limit: number of characters, at least 1.
    """
    whole = list(dict.fromkeys(names))
    rest = whole
    for shorter in (_without_common_beginning, _without_way_to_number):
        if any(len(name) > limit for name in rest):
            found = shorter(whole)
            rest = found if len(set(found)) == len(whole) else rest
    longest = max(map(len, rest), default=0)
    cut = ([_cut(name, room) for name in rest] for room in range(min(limit, longest), longest + 1))
    labels = next(found for found in cut if len(set(found)) == len(whole))
    return dict(zip(whole, labels, strict=True))


def _without_common_beginning(names: Sequence[str]) -> list[str]:
    """The names without the parts that all begin with; a part of each is left, and all of a single one."""
    parts = [name.split(".") for name in names]
    if len(names) < 2:
        return list(names)
    together = zip(*(own[:-1] for own in parts), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, together))
    return [".".join(own[common:]) for own in parts]


def _without_way_to_number(names: Sequence[str]) -> list[str]:
    """The same, with … for what stands between the first part and the first one with a digit."""
    found = []
    for name in _without_common_beginning(names):
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if _has_digit(part)), 0)
        found.append(f"{parts[0]}…{'.'.join(parts[first:])}" if first > 1 else name)
    return found


def _cut(name: str, room: int) -> str:
    """The name with its parts cut until it fits, or as far as they can be."""
    parts = name.split(".")
    lengths = [len(part) for part in parts]
    for numbered in (False, True):
        own = [i for i, part in enumerate(parts) if _has_digit(part) is numbered]
        while sum(lengths) + len(parts) - 1 > room:
            place = max(own, key=lambda i: lengths[i], default=None)
            if place is None or lengths[place] <= _SHORTEST:
                break
            lengths[place] -= 1
    return ".".join(shortened(part, length) for part, length in zip(parts, lengths, strict=True))


def _has_digit(part: str) -> bool:
    return any(map(str.isdigit, part))
