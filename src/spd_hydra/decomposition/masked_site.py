"""What stands in place of a site's layer in one forward pass."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra.decomposition.layers import bias_vector, is_embedding
from spd_hydra.decomposition.masks import SiteMask, require_rows
from spd_hydra.decomposition.patching import AtSite
from spd_hydra.decomposition.subcomponents import inner_activation
from spd_hydra.factored import Activation, Factored, selected, write


class MaskedSite(NamedTuple):
    """Masked subcomponents and weight delta in place of a layer.

    `inner` (h = x V) and `own` (the layer's own output) are given where the site's input is the clean one.
    """

    mask: SiteMask
    V: Float[Tensor, "d_in C"]
    U: Float[Tensor, "C d_out"]
    inner: Float[Tensor, "*positions C"] | None = None
    own: Activation | None = None

    def output(self, name: str, layer: nn.Module, x: Activation) -> Activation:
        """y = (h ⊙ (m - δ)) U + δ·xWᵀ + b, or the layer's own output where the route does not lead here."""
        mask, delta, route = self.mask
        h = inner_activation(x, self.V, is_embedding(layer)) if self.inner is None else self.inner
        require_rows(name, self.mask, h.shape[:-1])
        own = self.own
        if own is None and not (delta is None and route is None):
            own = layer(x)
        bias = bias_vector(layer)
        if delta is None:
            y = write(h if mask is None else h * mask, self.U, layer)
            y = y if bias is None else y + bias
        else:
            assert own is not None, "a delta mask needs the layer's own output"
            delta = delta[..., None]
            y = write(h * ((1 if mask is None else mask) - delta), self.U, layer)
            y = y + (own.scaled(delta[..., 0]) if isinstance(own, Factored) else delta * own)
            y = y if bias is None else y + (1 - delta) * bias  # `own` brings its share of the bias
        if route is None:
            return y
        assert own is not None, "routing needs the layer's own output"
        return selected(route, y, own)


StandIns = Mapping[str, MaskedSite | Activation]
"""By site: what stands in place of its layer, or its output, where that is known to be the clean one."""


def with_fixed_matrices(sites: StandIns) -> StandIns:
    """The same, but V and U get no gradient."""
    return {
        name: site._replace(V=site.V.detach(), U=site.U.detach()) if isinstance(site, MaskedSite) else site
        for name, site in sites.items()
    }


def standing_in(sites: StandIns, outputs: dict[str, Activation] | None = None) -> AtSite:
    """What the sites of a pass do; `outputs` is filled with the output of every masked site."""

    def at_site(name: str, layer: nn.Module, x: Activation) -> Activation:
        own = sites.get(name)
        if own is None:
            y: Activation = layer(x)
            return y
        if not isinstance(own, MaskedSite):
            return own
        y = own.output(name, layer, x)
        if outputs is not None:
            outputs[name] = y
        return y

    return at_site
