"""Masks m on subcomponents and δ on the weight delta, made from causal importances g and sources r."""

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_hydra.ci_fn.sigmoid import CausalImportance, Sigmoid, lower


class SiteMask(NamedTuple):
    """How one site is masked in a forward pass.

    `mask`: m, `[..., C]`, None for all ones. `delta`: δ, `[...]`, None to leave the weight delta out: then
    m = 1 gives what the subcomponents sum to and not the layer. `route`: True where the masked output
    replaces the layer's own, `[...]`, None for everywhere. To take subcomponents out and leave all else as
    it is: `DecomposedModel.ablated`.
    """

    mask: Float[Tensor, "*positions C"] | None = None
    delta: Float[Tensor, "*positions"] | None = None
    route: Bool[Tensor, "*positions"] | None = None


def require_masks(masks: Mapping[str, SiteMask], sites: Mapping[str, int], dtype: torch.dtype) -> None:
    """Refuse masks of what is no site, of other subcomponents or types, and a mask on its own as a SiteMask.

    Args:
        masks: by site.
        sites: C of every site.
        dtype: of V and U.

    Raises:
        ValueError: names the sites that there are, C, or the type.
        TypeError: says how the mask is given.
    """
    if unknown := set(masks) - set(sites):
        raise no_such_site(unknown, sites)
    for site, mask in masks.items():
        if not isinstance(mask, SiteMask):
            raise TypeError(f"masks[{site!r}]: got a {type(mask).__name__}, must be SiteMask(mask=…)")
        for name, own in mask._asdict().items():
            if own is not None:
                _require_tensor(f"masks[{site!r}].{name}", own, torch.bool if name == "route" else dtype)
        m, C = mask.mask, sites[site]
        if m is not None and m.dim() and m.shape[-1] not in {1, C}:
            raise ValueError(
                f"masks[{site!r}]: got a mask of shape {list(m.shape)}, must be [..., {C}]: one number for "
                f"each of the C = {C} subcomponents of the site"
            )


def _require_tensor(name: str, given: object, dtype: torch.dtype) -> None:
    if not isinstance(given, Tensor):
        kind = str(dtype).removeprefix("torch.")
        raise TypeError(
            f"{name}: got a {type(given).__name__}, must be a tensor, {kind}, as torch.tensor(…); one "
            "without axes counts everywhere"
        )
    if given.dtype != dtype and not _fits(given, dtype):
        kinds = [str(one).removeprefix("torch.") for one in (given.dtype, dtype)]
        raise ValueError(f"{name}: got {kinds[0]}, must be {kinds[1]}; give it .to({dtype})")


def _fits(given: Tensor, dtype: torch.dtype) -> bool:
    """Whether products with numbers of a type stay of that type, or autocast sees to it."""
    if dtype is torch.bool or given.dtype is torch.bool:
        return False
    fits = torch.promote_types(given.dtype, dtype) == dtype
    return fits or torch.is_autocast_enabled(given.device.type)


def require_rows(site: str, mask: SiteMask, positions: torch.Size) -> None:
    """Refuse a mask that is of other rows or positions than what a site reads.

    Raises:
        ValueError: names both shapes.
    """
    shapes = {"delta": mask.delta, "route": mask.route}
    found = {name: own.shape for name, own in shapes.items() if own is not None}
    if mask.mask is not None:
        found = {"mask": mask.mask.shape[:-1]} | found
    for name, shape in found.items():
        if any(n != own and 1 not in (n, own) for n, own in zip(shape[::-1], positions[::-1], strict=False)):
            axes = ", C" if name == "mask" else ""
            raise ValueError(
                f"masks[{site!r}].{name}: got one for positions {list(shape)}, but what the site reads has "
                f"{list(positions)}; its shape must be [{', '.join(map(str, positions))}{axes}]"
            )


def no_such_site(names: Iterable[str], sites: Iterable[str]) -> ValueError:
    """What is raised for names that are no sites."""
    return ValueError(f"no such site: {sorted(names)}; the sites are {list(sites)}")


class MaskSource(Enum):
    """Where the sources r of `m = g + (1 - g)·r` come from."""

    unmasked = "unmasked"
    ci = "ci"
    stochastic = "stochastic"
    binomial = "binomial"


def draw_mask(
    source: MaskSource,
    ci: CausalImportance,
    *,
    draws: Float[Tensor, "*positions columns"],
    use_delta: bool,
    sigmoid: Sigmoid,
) -> SiteMask:
    """One draw of masks for one site (paper, §2.2).

    `stochastic`: r ~ U(0, 1) per position and subcomponent, δ ~ U(0, 1) per position. `binomial`:
    r is 0 or 1 with equal chance and g is taken at 1.05·z - 0.05·u, u ~ U(0, 1). `ci`: r = 0, no
    delta. `unmasked`: m = 1, no delta.

    Args:
        source: the kind of mask.
        ci: causal importances of the site.
        draws: independent U(0, 1), as many columns as `columns_needed` says.
        use_delta: whether random masks also draw a δ.
        sigmoid: the lower function, for `binomial`.
    """
    if source is MaskSource.unmasked:
        return SiteMask()
    if source is MaskSource.ci:
        return SiteMask(mask=ci.lower)
    C = ci.lower.shape[-1]
    g, r, delta = ci.lower, draws[..., :C], draws[..., C]
    if source is MaskSource.binomial:
        g = lower(1.05 * ci.z - 0.05 * draws[..., C + 1 :], sigmoid)
        r = (r < 0.5).to(g.dtype)
    return _mixed(g, r, delta if use_delta else None)


def mask_from_sources(
    ci: CausalImportance, sources: Float[Tensor, "*#positions columns"], *, use_delta: bool
) -> SiteMask:
    """The mask of one site with given sources: m = g + (1 - g)·r.

    Args:
        ci: causal importances of the site.
        sources: in [0, 1]: r of each of the C subcomponents, then δ; shared along axes of length 1.
        use_delta: whether the mask has a δ.
    """
    r, delta = sources[..., :-1], sources[..., -1]
    return _mixed(ci.lower, r, delta.expand(ci.lower.shape[:-1]) if use_delta else None)


def _mixed(g: Tensor, r: Tensor, delta: Tensor | None) -> SiteMask:
    return SiteMask(mask=g + (1 - g) * r, delta=delta)


def columns_needed(source: MaskSource, C: int) -> int:
    """Random numbers per position that `draw_mask` takes for one site of C subcomponents."""
    return {MaskSource.stochastic: C + 1, MaskSource.binomial: 2 * C + 1}.get(source, 0)
