"""A frozen target whose chosen matrices can be replaced, per forward pass, by masked subcomponents."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, Self, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spd_hydra import rng
from spd_hydra.ci_fn.base import CausalImportanceFn, SiteActivation, SiteShape
from spd_hydra.ci_fn.layers import site_key
from spd_hydra.ci_fn.sigmoid import CausalImportance, causal_importance
from spd_hydra.decomposition.ablation import Chosen, chosen_indices, without
from spd_hydra.decomposition.blocks import AtBlock, CleanBlocks, run_block
from spd_hydra.decomposition.clean_pass import CleanPass, Reuse
from spd_hydra.decomposition.compiled_blocks import CompiledBlocks
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.hooks import Hook, registered
from spd_hydra.decomposition.identities import find_identities
from spd_hydra.decomposition.inputs import as_batch, real_positions, told_of_batch
from spd_hydra.decomposition.layers import is_embedding, weight_matrix
from spd_hydra.decomposition.masked_site import (
    MaskedSite,
    StandIns,
    standing_in,
    with_fixed_matrices,
)
from spd_hydra.decomposition.masks import SiteMask, no_such_site, require_masks
from spd_hydra.decomposition.patched_target import PatchedTarget
from spd_hydra.decomposition.sites import check_ties, find_sites, unfit_sites
from spd_hydra.decomposition.subcomponents import (
    Subcomponents,
    TiedSubcomponents,
    inner_activation,
    weight_delta,
)
from spd_hydra.factored import Activation


class DecomposedModel(nn.Module):
    """The target, its subcomponents and its causal-importance function.

    Only the subcomponents and the causal-importance function have trainable parameters. The target
    stays in evaluation mode and is never modified, but for hooks within `hooked`: masked passes run on a copy
    of its module tree that shares every parameter and buffer and holds a wrapper in place of each site.

    Attributes:
        inits: by site, how V and U start.
        lr_factors: by site, what their learning rate is multiplied with.
        patched: the copy of the target on which masked passes run; it shares the target's tensors.
        number_of: C, the number of subcomponents, by site.
        passed_over: layers that the patterns match and that are no sites, with the reason.
        roots: sites whose input no other site influences, whose clean quantities masked passes reuse.
        is_hooked: whether passes run with the hooks of `hooked`.
        compiled_blocks: compiles the blocks of masked passes that have gradients; None: they run as they are.

    Args:
        target: the trained model; this constructor freezes its parameters and sets evaluation mode.
        config: sites, number of subcomponents, ties, sigmoid.
        ci_fn: the causal-importance function.
        seed: the run's seed; initial values come from it.
        passed_over: layers that the patterns match and that are left out, with the reason.

    Raises:
        ConfigError: a pattern that matches nothing, a module matched twice, impossible ties, an identity in
            front of a module of unknown width.
    """

    def __init__(
        self,
        target: nn.Module,
        config: Decomposition,
        ci_fn: CausalImportanceFn,
        *,
        seed: int,
        passed_over: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        sites = find_sites(target, config.sites, passed_over)
        self.passed_over = dict(passed_over)
        check_ties(target, config.tied, sites, config.sites)
        identities = find_identities(target, config.identities)
        self.config = config
        self.target = target.requires_grad_(False).eval()
        self.identities = nn.ModuleDict({site_key(name): layer for name, (_, layer) in identities.items()})
        self._layers = {name: target.get_submodule(name) for name in sites}
        self._layers |= {name: layer for name, (_, layer) in identities.items()}
        sites |= {name: entry for name, (entry, _) in identities.items()}
        self.inits = {name: entry.init or config.init for name, entry in sites.items()}
        self.lr_factors = {name: entry.lr_factor for name, entry in sites.items()}
        self.site_names = tuple(sites)
        self.roots: frozenset[str] = frozenset()
        self.compiled_blocks: CompiledBlocks | None = None
        self.is_hooked = False
        self.patched = self._patch()
        self.subcomponents = self._make_subcomponents(sites, seed)
        self.number_of = {name: self.pieces(name).C for name in self.site_names}
        self.ci_fn = ci_fn.build(self.site_shapes(), rng.generator(seed, "ci_fn"))

    def _make_subcomponents(self, sites: Mapping[str, SitePattern], seed: int) -> nn.ModuleDict:
        made: dict[str, nn.Module] = {}
        for name in sorted(sites, key=lambda site: site in self.config.tied):  # sources before the tied
            source = self.config.tied.get(name)
            if source is not None:
                made[name] = TiedSubcomponents(cast(Subcomponents, made[source]))
            else:
                weight = weight_matrix(self._layers[name])
                generator = rng.generator(seed, f"subcomponents/{name}")
                C = sites[name].subcomponents
                made[name] = Subcomponents(weight, C, self.inits[name], generator)
        return nn.ModuleDict({site_key(name): made[name] for name in sites})

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A move to another device or precision replaces buffers: the copy has to share the new ones.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.patched = self._patch()
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self.is_hooked:
            raise ValueError("model.hooked: a copy would keep the hooks for good; make it outside the block")
        return {name: value for name, value in vars(self).items() if name != "patched"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.patched = self._patch()  # it shares the tensors of the target, which were made anew

    def _patch(self) -> PatchedTarget:
        identities = {
            name: self._layers[name] for name in self.site_names if site_key(name) in self.identities
        }
        return PatchedTarget(self.target, self.matrix_names, identities)

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the trainable parts; the target's stays what it was trained for."""
        super().train(mode)
        self.target.eval()
        return self

    @property
    def matrix_names(self) -> tuple[str, ...]:
        """The sites that are matrices of the target, without the identities that were put into it."""
        return tuple(name for name in self.site_names if site_key(name) not in self.identities)

    @property
    def device(self) -> torch.device:
        """Where the model's parameters are."""
        return next(self.subcomponents.parameters()).device

    def pieces(self, site: str) -> Subcomponents:
        """The subcomponents of a site: `.V`, `[d_in, C]`, and `.U`, `[C, d_out]`."""
        if site_key(site) not in self.subcomponents:
            raise no_such_site([site], self.site_names)
        return cast(Subcomponents, self.subcomponents[site_key(site)])

    def weight(self, site: str) -> Float[Tensor, "d_out d_in"]:
        """The target's own matrix at a site."""
        if site not in self._layers:
            raise no_such_site([site], self.site_names)
        return weight_matrix(self._layers[site])

    def weight_delta(self, site: str) -> Float[Tensor, "d_out d_in"]:
        """Δ = W - (V U)ᵀ at a site."""
        pieces = self.pieces(site)
        return weight_delta(self.weight(site), pieces.V, pieces.U)

    def site_shapes(self) -> dict[str, SiteShape]:
        """Input width, number of subcomponents and kind of every site."""
        return {
            name: SiteShape(self.weight(name).shape[1], self.pieces(name).C, is_embedding(self._layers[name]))
            for name in self.site_names
        }

    def matrices(self, sites: Iterable[str]) -> list[nn.Parameter]:
        """V and U of the given sites as they are trained, each once: at a tied site those of its source."""
        owners = dict.fromkeys(self.config.tied.get(site, site) for site in sites)
        return [parameter for owner in owners for parameter in self.pieces(owner).parameters()]

    def component_parameters(self) -> Iterator[nn.Parameter]:
        """V and U of every site; a tied pair counts once."""
        return self.subcomponents.parameters()

    def component_groups(self) -> dict[float, list[nn.Parameter]]:
        """The same by the factor on their learning rate."""
        groups: dict[float, list[nn.Parameter]] = {}
        for name in self.site_names:
            if name not in self.config.tied:
                groups.setdefault(self.lr_factors[name], []).extend(self.pieces(name).parameters())
        return groups

    def ci_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the causal-importance function."""
        return self.ci_fn.parameters()

    def trainable_state(self) -> dict[str, Tensor]:
        """Parameters of the subcomponents and of the causal-importance function, by name."""
        return {name: p.detach() for name, p in self._trainable()}

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        parts = ("subcomponents.", "ci_fn.")
        return ((name, p) for name, p in self.named_parameters() if name.startswith(parts))

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Whether the trainable parts ask for gradients; the target never does."""
        for _, parameter in self._trainable():
            parameter.requires_grad_(requires_grad)
        return self

    def load_trainable_state(self, state: Mapping[str, Tensor]) -> None:
        """Set what `trainable_state` gave.

        Raises:
            ValueError: names or shapes differ from this model's.
        """
        own = dict(self._trainable())
        if own.keys() != state.keys():
            raise ValueError(
                f"saved weights do not fit this model: {sorted(own.keys() ^ state.keys())} differ"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                if parameter.shape != state[name].shape:
                    raise ValueError(
                        f"{name}: saved {tuple(state[name].shape)}, model {tuple(parameter.shape)}"
                    )
                parameter.copy_(state[name])

    def forward(
        self,
        batch: Tensor | Mapping[str, Any],
        masks: Mapping[str, SiteMask] | None = None,
        *,
        reuse: Reuse | None = None,
        outputs: dict[str, Activation] | None = None,
        recompute: bool = False,
        for_masks: bool = False,
    ) -> Tensor:
        """The model's output with the given sites masked; without masks, the target's own output.

        A masked site computes y = (h ⊙ (m - δ)) U + δ·xWᵀ + b, which equals
        (h ⊙ m) U + δ·(x Δᵀ) + b without forming Δ.

        Args:
            batch: input of the target, or what a tokenizer returns, see `as_batch`.
            masks: by site; a site that is absent keeps its own layer, on the current input.
            reuse: quantities of the clean pass on the same batch, to avoid computing them again.
            outputs: is filled with the output of every masked site.
            recompute: keep the inputs of blocks alone for the backward pass, which runs each block again.
            for_masks: gradients with respect to masks are wanted and none for V and U, which compiled blocks
                would compute with the rest.
        """
        batch = as_batch(batch, self.target)
        if masks is None:
            return cast(Tensor, self.target(batch))
        require_masks(masks, self.number_of, next(self.component_parameters()).dtype)
        if reuse is None:
            self.patched.require_current()
        elif self.is_hooked or reuse.clean.is_hooked:  # what was computed before holds no longer
            reuse = None
        sites = self._standing_in(masks, reuse)
        at_site = standing_in(sites, outputs)
        if reuse is None:
            return self.patched.run(batch, at_site)
        run: AtBlock = run_block
        if torch.is_grad_enabled():
            if self.compiled_blocks is not None and outputs is None:
                own = with_fixed_matrices(sites) if for_masks else sites
                run = self.patched.compiled(self.compiled_blocks, own, lone=len(masks) == 1)
            run = self.patched.recomputing(at_site, run) if recompute else run
        lone = next(iter(masks)) if len(masks) == 1 else None
        at_block = run if lone is None else reuse.clean.blocks.reused_before(lone, run)
        return self.patched.run(batch, at_site, at_block, reuse.products)

    def ablated(self, batch: Tensor | Mapping[str, Any], subcomponents: Mapping[str, Chosen]) -> Tensor:
        """The target's output without some subcomponents, all else as it is, the weight delta included.

        At each site given, y = W x + b - Σ_c h_c U_c over its subcomponents c, on the current input x.

        Args:
            batch: input of the target.
            subcomponents: by site an index, several, or a boolean mask of length C; other sites keep
                their own layer.

        Raises:
            ValueError: there is no such site, or no such subcomponent, or the target does not take the batch.
        """
        batch = as_batch(batch, self.target)
        masks = {
            site: without(own, self.number_of[site], self.pieces(site).V)
            for site, own in chosen_indices(subcomponents, self.number_of).items()
        }
        self.patched.require_current()
        with self._told_of(batch):
            return self(batch, masks)  # type: ignore[no-any-return]

    def _told_of(self, batch: Tensor) -> AbstractContextManager[None]:
        """Say which batch the target does not take; what a hook raises is left as it is."""
        return nullcontext() if self.is_hooked else told_of_batch(batch, self.target)

    @contextmanager
    def hooked(self, hooks: Mapping[str, Hook]) -> Iterator[None]:
        """All passes of the block run with forward hooks: clean, masked and ablated ones, causal importances.

        A hook registered on `target` alone would not be seen by masked passes, which run on a copy. At a site
        `output` is what the masked subcomponents give. Blocks may stand in blocks.

        Args:
            hooks: by path of the target's module a function of (module, inputs, output), as torch calls it:
                what it returns takes the place of the output, None leaves it.

        Raises:
            ValueError: the target has no such module, or has hooks that were registered otherwise.
            TypeError: a hook cannot be called.
        """
        self.patched.require_current()
        before = self.is_hooked
        try:
            with registered(self.target, hooks):
                self.is_hooked, self.patched = True, self._patch()
                yield
        finally:
            self.is_hooked, self.patched = before, self._patch()

    @contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Passes of the block run as they are, also where they are differentiated."""
        compiled, self.compiled_blocks = self.compiled_blocks, None
        try:
            yield
        finally:
            self.compiled_blocks = compiled

    def _standing_in(self, masks: Mapping[str, SiteMask], reuse: Reuse | None) -> StandIns:
        """What stands in place of the sites' layers in a pass."""
        # A lone masked site sees clean activations whatever the architecture. To reuse those of roots where
        # other sites are masked too would make their block unlike the rest, to be compiled apart.
        roots = self.roots if self.compiled_blocks is None else frozenset[str]()
        clean_sites = frozenset(masks) if len(masks) == 1 else roots
        found: dict[str, MaskedSite | Activation] = {}
        for name, mask in masks.items():
            pieces = self.pieces(name)
            found[name] = MaskedSite(mask, pieces.V, pieces.U)
            if reuse is not None and name in clean_sites:
                own, h = reuse.clean.outputs[name], reuse.activations[name].inner
                found[name] = MaskedSite(mask, pieces.V, pieces.U, h, own)
        if reuse is not None and len(masks) == 1:
            found |= {name: reuse.clean.outputs[name] for name in reuse.clean.blocks.sites_before(*masks)}
        return found

    @torch.no_grad()
    def clean_pass(self, batch: Tensor) -> CleanPass:
        """The target's own forward pass, with the input and output of every site."""
        inputs: dict[str, Activation] = {}
        outputs: dict[str, Activation] = {}
        blocks = CleanBlocks()
        again: dict[str, None] = {}

        def at_site(name: str, layer: nn.Module, x: Activation) -> Activation:
            if name in inputs:
                again[name] = None
                return cast(Activation, layer(x))
            blocks.site_begins(name)
            inputs[name], outputs[name] = x, layer(x)
            return outputs[name]

        output = self.patched.run(batch, at_site, blocks.record)
        if again:
            reason = "which the target runs more than once per forward pass"
            raise unfit_sites(reason, again, self.target, self.matrix_names)
        if idle := [name for name in self.site_names if name not in inputs]:
            raise unfit_sites("which the target never runs", idle, self.target, self.matrix_names)
        return CleanPass(output, inputs, outputs, blocks, self.is_hooked)

    def activations(self, clean: CleanPass) -> dict[str, SiteActivation]:
        """Each site's clean input x and inner activation h = x V, the gradient to V attached."""
        return {
            name: SiteActivation(
                x, inner_activation(x, self.pieces(name).V, is_embedding(self._layers[name]))
            )
            for name, x in clean.inputs.items()
        }

    def importances(
        self, activations: Mapping[str, SiteActivation], valid: Bool[Tensor, "*positions"] | None = None
    ) -> dict[str, CausalImportance]:
        """Causal importances of every site from clean activations; `valid`: positions that are no padding."""
        pre_sigmoid = self.ci_fn(activations, valid=valid)
        return {name: causal_importance(z, self.config.sigmoid) for name, z in pre_sigmoid.items()}

    def causal_importances(self, batch: Tensor | Mapping[str, Any]) -> dict[str, CausalImportance]:
        """Causal importances g of a batch by site, `[..., C]`: `.lower`, `.upper`, in [0, 1] up to a leak.

        Negative token ids are padding, as in training: no real position's importances depend on them. What a
        tokenizer returns may be given as it is, see `as_batch`.

        Raises:
            ValueError: the target does not take the batch.
        """
        batch = as_batch(batch, self.target)
        self.patched.require_current()
        with self._told_of(batch):
            activations = self.activations(self.clean_pass(batch))
        positions = next(iter(activations.values())).inner.shape[:-1]
        return self.importances(activations, valid=real_positions(batch, positions))
