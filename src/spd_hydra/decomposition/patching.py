"""A copy of the target in which chosen layers do what a switch says.

Wrappers rather than hooks: a compiler ignores hooks that were added later, and the target stays untouched.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from spd_hydra.decomposition.blocks import BlockSwitch, wrap_blocks
from spd_hydra.decomposition.hooks import hooks_of, move_hooks
from spd_hydra.decomposition.identities import SUFFIX, insert
from spd_hydra.decomposition.sites import unfit_sites
from spd_hydra.factored import Activation, keep_factors
from spd_hydra.section import ConfigError

AtSite = Callable[[str, nn.Module, Activation], Activation]
"""Called in place of a site's layer with its name, the layer and the input; gives the output."""


class Switch(BlockSwitch):
    """What the wrapped sites and blocks of one patched copy do now; None: what the target does."""

    def __init__(self) -> None:
        super().__init__()
        self.at_site: AtSite | None = None
        self.positions: torch.Size | None = None
        """Of token ids, `[batch, length]`, while a pass runs."""


class _SiteWrapper(nn.Module):
    def __init__(
        self, name: str, layer: nn.Module, switch: Switch, refused: Callable[[str], ConfigError]
    ) -> None:
        super().__init__()
        self.name, self.layer, self.switch, self.refused = name, layer, switch, refused
        move_hooks(layer, self)

    def forward(self, x: Activation) -> Activation:
        if self.switch.at_site is None:
            return cast(Activation, self.layer(x))
        positions = self.switch.positions
        if positions is not None and isinstance(x, Tensor) and _has_positions_as_rows(x, positions):
            # Some models, as OPT, take all positions of their MLPs as rows; masks are by row and position.
            y = self.switch.at_site(self.name, self.layer, x.view(*positions, -1))
            return cast(Tensor, y).flatten(0, 1)
        return self.switch.at_site(self.name, self.layer, x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = getattr(super().__getattr__("layer"), name)
        if isinstance(found, Tensor):  # what a target makes of a matrix by itself would not be masked
            raise self.refused(self.name)
        return found


def _has_positions_as_rows(x: Tensor, positions: torch.Size) -> bool:
    """Whether an input has a vector for each position, all in one row of rows; token ids are no vectors."""
    return x.dim() == 2 and x.is_floating_point() and len(x) == positions.numel()


def patched_copy(
    target: nn.Module, sites: tuple[str, ...], switch: Switch, identities: Mapping[str, nn.Module]
) -> nn.Module:
    """A copy of the module tree that shares all tensors, with a wrapper in place of each site.

    Args:
        target: is left as it is.
        sites: paths of layers.
        switch: says what the wrapped sites do.
        identities: by site, identity matrices to put in front of the modules that the sites are named by.

    Raises:
        ConfigError: in a pass of the copy, which reads the matrix of a site itself instead of calling it.
    """

    def refused(site: str) -> ConfigError:
        reason = "whose matrix the target reads itself instead of calling the layer"
        return unfit_sites(reason, [site], target, sites, is_first_of_kind=True)

    hooks = [hook for module in target.modules() for hook in hooks_of(module)]
    shared = {id(one): one for one in [*target.parameters(), *target.buffers(), *hooks]}
    try:
        patched = copy.deepcopy(target, shared)
    except RuntimeError as error:  # a tensor that was computed stands where a parameter should
        raise ConfigError(
            f"model: the target cannot be copied ({str(error).partition('.')[0]}); make pruning or weight "
            "normalisation permanent first, e.g. by torch.nn.utils.prune.remove or remove_weight_norm"
        ) from error
    layers = {name: patched.get_submodule(name) for name in sites}
    wrappers = {id(layer): _SiteWrapper(name, layer, switch, refused) for name, layer in layers.items()}
    # Also where the target holds the same layer under a second name.
    for path, layer in list(patched.named_modules(remove_duplicate=False)):
        if id(layer) in wrappers:
            parent, _, attribute = path.rpartition(".")
            setattr(patched.get_submodule(parent), attribute, wrappers[id(layer)])
    for name, layer in identities.items():  # after the wrappers: an identity also acts before a masked layer
        insert(
            patched.get_submodule(name.removesuffix(f".{SUFFIX}")), _SiteWrapper(name, layer, switch, refused)
        )
    wrap_blocks(patched, switch)
    if not hooks:  # which are given tensors
        keep_factors(patched)
    return patched
