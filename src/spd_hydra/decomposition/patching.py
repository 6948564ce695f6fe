"""A copy of the target in which chosen layers do what a switch says.

Wrappers rather than hooks: a compiler ignores hooks that were added later, and the target stays untouched.
"""

import copy
from collections.abc import Callable, Mapping
from typing import cast

from torch import nn

from spd_hydra.decomposition.blocks import BlockSwitch, wrap_blocks
from spd_hydra.decomposition.identities import SUFFIX, insert
from spd_hydra.factored import Activation, keep_factors

AtSite = Callable[[str, nn.Module, Activation], Activation]
"""Called in place of a site's layer with its name, the layer and the input; gives the output."""


class Switch(BlockSwitch):
    """What the wrapped sites and blocks of one patched copy do now; None: what the target does."""

    def __init__(self) -> None:
        super().__init__()
        self.at_site: AtSite | None = None


class _SiteWrapper(nn.Module):
    def __init__(self, name: str, layer: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.name, self.layer, self.switch = name, layer, switch

    def forward(self, x: Activation) -> Activation:
        if self.switch.at_site is None:
            return cast(Activation, self.layer(x))
        return self.switch.at_site(self.name, self.layer, x)


def patched_copy(
    target: nn.Module, sites: tuple[str, ...], switch: Switch, identities: Mapping[str, nn.Module]
) -> nn.Module:
    """A copy of the module tree that shares all tensors, with a wrapper in place of each site.

    Args:
        target: is left as it is.
        sites: paths of layers.
        switch: says what the wrapped sites do.
        identities: by site, identity matrices to put in front of the modules that the sites are named by.
    """
    shared = {id(tensor): tensor for tensor in [*target.parameters(), *target.buffers()]}
    patched = copy.deepcopy(target, shared)
    layers = {name: patched.get_submodule(name) for name in sites}
    wrappers = {id(layer): _SiteWrapper(name, layer, switch) for name, layer in layers.items()}
    # Also where the target holds the same layer under a second name.
    for path, layer in list(patched.named_modules(remove_duplicate=False)):
        if id(layer) in wrappers:
            parent, _, attribute = path.rpartition(".")
            setattr(patched.get_submodule(parent), attribute, wrappers[id(layer)])
    for name, layer in identities.items():  # after the wrappers: an identity also acts before a masked layer
        insert(patched.get_submodule(name.removesuffix(f".{SUFFIX}")), _SiteWrapper(name, layer, switch))
    wrap_blocks(patched, switch)
    keep_factors(patched)
    return patched
