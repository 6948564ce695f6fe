"""Routing: at which sites and positions a masked output replaces the layer's own."""

from collections.abc import Iterator, Sequence
from enum import Enum

from jaxtyping import Bool, Float
from torch import Tensor


class Routing(Enum):
    """`all` sites at once, one site at a time (`layerwise`), or a random subset per position.

    `uniform_k`: k ~ U{1..S}, then a uniform subset of k of the S sites. `static`: each site with a
    fixed probability.
    """

    all = "all"
    layerwise = "layerwise"
    uniform_k = "uniform_k"
    static = "static"


def routes(
    routing: Routing,
    sites: Sequence[str],
    *,
    draws: Float[Tensor, "*positions columns"],
    probability: float,
) -> Iterator[dict[str, Bool[Tensor, "*positions"] | None]]:
    """The routing masks of one draw, by site: one dictionary per forward pass.

    A site that is absent keeps its own layer everywhere; None routes it everywhere.

    Args:
        routing: the kind of routing.
        sites: all sites, in a fixed order.
        draws: independent U(0, 1), as many columns as `columns_needed` says.
        probability: chance of each site for `static`.
    """
    if routing is Routing.all:
        yield dict.fromkeys(sites)
    elif routing is Routing.layerwise:
        for site in sites:
            yield {site: None}
    else:
        score = draws[..., : len(sites)]
        if routing is Routing.uniform_k:
            # A site is in the subset if fewer than k sites scored below it.
            k = 1 + (draws[..., -1] * len(sites)).floor()
            rank = (score[..., None, :] < score[..., :, None]).sum(-1)
            chosen = rank < k[..., None]
        else:
            chosen = score < probability
        yield {site: chosen[..., index] for index, site in enumerate(sites)}


def columns_needed(routing: Routing, n_sites: int) -> int:
    """Random numbers per position that one draw of `routes` takes."""
    return {Routing.uniform_k: n_sites + 1, Routing.static: n_sites}.get(routing, 0)
