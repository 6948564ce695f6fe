"""Masks m on subcomponents and δ on the weight delta, made from causal importances g and sources r."""

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import NamedTuple

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


def require_masks(masks: Mapping[str, SiteMask], sites: Mapping[str, int]) -> None:
    """Refuse masks of what is no site, of other subcomponents, and a mask on its own in place of a SiteMask.

    Args:
        masks: by site.
        sites: C of every site.

    Raises:
        ValueError: names the sites that there are, or C.
        TypeError: says how the mask is given.
    """
    if unknown := set(masks) - set(sites):
        raise no_such_site(unknown, sites)
    for site, mask in masks.items():
        if not isinstance(mask, SiteMask):
            raise TypeError(f"masks[{site!r}]: got a {type(mask).__name__}, must be SiteMask(mask=…)")
        m, C = mask.mask, sites[site]
        if m is not None and m.dim() and m.shape[-1] not in {1, C}:
            raise ValueError(
                f"masks[{site!r}]: got a mask of shape {list(m.shape)}, must be [..., {C}]: one number for "
                f"each of the C = {C} subcomponents of the site"
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
