"""Passes of a target in which something else stands in place of its sites, block by block if so wished."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spd_hydra.decomposition.blocks import AtBlock, BlockWrapper, run_block
from spd_hydra.decomposition.compiled_blocks import CompiledBlocks
from spd_hydra.decomposition.hooks import AsCopied
from spd_hydra.decomposition.masked_site import StandIns, standing_in
from spd_hydra.decomposition.patching import AtSite, Switch, patched_copy
from spd_hydra.factored import KeepsFactors, Products, sharing
from spd_hydra.places import call


class PatchedTarget:
    """A copy of the target's module tree that shares its tensors, with wrappers in place of its sites.

    Attributes:
        module: the copy.

    Args:
        target: is left as it is.
        sites: paths of layers.
        identities: by site, identity matrices to put in front of the modules that the sites are named by.
    """

    def __init__(
        self, target: nn.Module, sites: tuple[str, ...], identities: Mapping[str, nn.Module]
    ) -> None:
        self._switch = Switch()
        self._target, self._as_copied = target, AsCopied(target)
        self.module = patched_copy(target, sites, self._switch, identities)

    def require_current(self) -> None:
        """Refuse a target whose modules or hooks are no longer those of the copy."""
        self._as_copied.require_same(self._target)

    @property
    def n_blocks(self) -> int:
        """Blocks of the target: elements of its outermost lists of modules."""
        return sum(isinstance(module, BlockWrapper) for module in self.module.modules())

    @property
    def shares_products(self) -> bool:
        """Whether masked passes of a batch share products of parameters, see `factored.py`."""
        return any(isinstance(module, KeepsFactors) for module in self.module.modules())

    def run(
        self,
        batch: Tensor,
        at_site: AtSite,
        at_block: AtBlock | None = None,
        products: Products | None = None,
    ) -> Tensor:
        """The output for a batch.

        Args:
            batch: input of the target.
            at_site: called in place of each site's layer.
            at_block: called in place of each block; None: they run as they are.
            products: of parameters, which the passes of a batch share.
        """
        positions = None if batch.is_floating_point() or batch.dim() != 2 else batch.shape
        with self._switched(at_site, at_block, positions), sharing(products):
            return cast(Tensor, self.module(batch))

    def compiled(self, blocks: CompiledBlocks, sites: StandIns, *, lone: bool) -> AtBlock:
        """Runs a block of a pass, compiled by itself.

        The block of a lone masked site runs as it is: there would be as many ways to compile it as it has
        sites, for the one block among many whose arithmetic is mostly known from the clean pass.
        """

        def run(path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            def whole(tensors: dict[str, Tensor], own: StandIns, args: Any, kwargs: Any) -> Any:
                with self._switched(standing_in(own), None, self._switch.positions):
                    return call(block, tensors, args, kwargs)

            tensors = dict(block.named_parameters()) | dict(block.named_buffers())
            own = {name: site for name, site in sites.items() if name.startswith(f"{path}.")}
            if lone and own:
                return run_block(path, block, args, kwargs)
            return blocks(path, whole, tensors, own, args, kwargs)

        return run

    def recomputing(self, at_site: AtSite, run: AtBlock) -> AtBlock:
        """The same as `run`, but the backward pass runs a block again."""

        def at(path: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            positions = self._switch.positions  # of this pass, which is over when the block runs again

            def again() -> Any:
                # Products that passes share would be there already when the block runs again.
                with self._switched(at_site, None, positions), sharing({}):
                    return run(path, block, args, kwargs)

            return checkpoint(again, use_reentrant=False, preserve_rng_state=False)

        return at

    @contextmanager
    def _switched(
        self, at_site: AtSite, at_block: AtBlock | None, positions: torch.Size | None
    ) -> Iterator[None]:
        switch = self._switch
        before = switch.at_site, switch.at_block, switch.positions
        switch.at_site, switch.at_block, switch.positions = at_site, at_block, positions
        try:
            yield
        finally:
            switch.at_site, switch.at_block, switch.positions = before
