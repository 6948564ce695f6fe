"""Subcomponents that a person names, and the masks that take them out."""

import operator
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from spd_hydra.decomposition.masks import SiteMask, no_such_site

Chosen = SupportsIndex | Iterable[Any] | Tensor
"""Subcomponents of a site: an index, several, or a boolean mask with an entry for each."""


def chosen_indices(given: Mapping[str, Chosen], sites: Mapping[str, int]) -> dict[str, list[int]]:
    """By site the indices of subcomponents, in the order given, each once.

    Args:
        given: by site an index, indices (an iterable, or a tensor or array with one axis), or a boolean mask
            of length C.
        sites: C of every site.

    Raises:
        TypeError: it is not given by site.
        ValueError: there is no such site or subcomponent, or the indices are something else.
    """
    if not isinstance(given, Mapping):
        raise TypeError(
            f"subcomponents: got a {type(given).__name__}, must be indices by site: {{site: [0, 3]}}"
        )
    if unknown := set(given) - set(sites):
        raise no_such_site(map(str, unknown), sites)
    return {site: _indices(chosen, sites[site], site) for site, chosen in given.items()}


def _indices(given: Chosen, C: int, site: str) -> list[int]:
    if not isinstance(given, Tensor | str) and isinstance(given, Iterable) and not hasattr(given, "dtype"):
        given = list(given)  # a generator can be gone through once
    values = given.tolist() if hasattr(given, "tolist") else given  # of tensors and arrays
    values = values if isinstance(values, list) else [values]
    if values and all(_is_truth(one) for one in values):
        if len(values) != C or _axes(given) == 0:
            raise _unfit(given, C, site)
        return [c for c, is_chosen in enumerate(values) if is_chosen]
    try:
        if any(_is_truth(one) for one in values):
            raise TypeError
        found = [operator.index(one) for one in values]
    except TypeError:
        raise _unfit(given, C, site) from None
    if wrong := [c for c in found if not 0 <= c < C]:
        raise ValueError(f"subcomponents[{site!r}]: got {wrong}, must be from 0 to {C - 1}")
    return list(dict.fromkeys(found))


def _is_truth(one: Any) -> bool:
    """Whether it is True or False, of Python, torch or numpy."""
    return isinstance(one, bool) or "bool" in str(getattr(one, "dtype", ""))


def _axes(given: Any) -> int:
    return getattr(given, "ndim", 1 if isinstance(given, list) else 0)


def _unfit(given: Any, C: int, site: str) -> ValueError:
    kind = type(given).__name__
    if hasattr(given, "dtype"):
        what = f"a {kind} of shape {list(given.shape)}, {str(given.dtype).removeprefix('torch.')}"
    else:
        what = f"the {kind} {str(given)[:60]}"
    return ValueError(
        f"subcomponents[{site!r}]: got {what}; must be an index from 0 to {C - 1}, several of them in one "
        f"row, or a boolean mask of length {C}"
    )


def without(subcomponents: Iterable[int], C: int, like: Tensor) -> SiteMask:
    """The mask that takes subcomponents of a site out everywhere and leaves the rest: δ = 1, m = 0 there.

    Args:
        subcomponents: their indices, in [0, C).
        C: number of subcomponents of the site.
        like: a tensor of the mask's device and type.
    """
    mask = torch.ones(C, device=like.device, dtype=like.dtype)
    mask[list(subcomponents)] = 0
    return SiteMask(mask=mask, delta=torch.ones_like(mask[0]))
