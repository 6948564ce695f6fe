"""Reconstruction: with masks on, the output has to stay that of the target."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_hydra.ci_fn.sigmoid import CausalImportance
from spd_hydra.decomposition import masks, routing
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import MaskSource, SiteMask, draw_mask
from spd_hydra.decomposition.routing import Routing, routes
from spd_hydra.loss.at_once import is_mapped, with_gradient
from spd_hydra.loss.base import Loss, LossInputs, Statistics
from spd_hydra.loss.divergence import divergence_count, divergence_sum
from spd_hydra.section import option

Route = Mapping[str, Bool[Tensor, "*positions"] | None]
"""The sites that one forward pass masks, and at which positions; None: at all of them."""

MakeMask = Callable[[str, CausalImportance], SiteMask]
"""Makes the mask of a site, whose route is set elsewhere, of the site's causal importances."""


@dataclasses.dataclass(kw_only=True)
class RoutedRecon(Loss):
    """A divergence between the target's output and that of passes in which routed sites are masked.

    One row of the grid of mask sources × {all, layerwise, uniform_k, static}; a subclass is a mask source, or
    several of them.
    """

    routing: Routing = option(Routing.all, "all | layerwise | uniform_k | static: sites masked together")
    probability: float = option(0.5, "chance that a site is masked, for routing=static", gt=0, le=1)

    def route_columns(self, model: DecomposedModel) -> int:
        """Random numbers per position that one draw of routes takes."""
        return routing.columns_needed(self.routing, len(model.site_names))

    def passes(self, model: DecomposedModel) -> int:
        return len(model.site_names) if self.routing is Routing.layerwise else 1

    def routes(self, model: DecomposedModel, draws: Float[Tensor, "*positions columns"]) -> list[Route]:
        """One draw of routes: the masked passes to make."""
        return list(routes(self.routing, model.site_names, draws=draws, probability=self.probability))


@dataclasses.dataclass(kw_only=True)
class Recon(RoutedRecon):
    """Mean divergence between the target's output and that of masked passes.

    One point of the grid {unmasked, ci, stochastic, binomial} × {all, layerwise, subset}. Mean over
    `n_samples` draws, over sites if layerwise, and over what the divergence averages. Range: ≥ 0.
    Paper, §2.2 (stochastic, all and layerwise); the rest is later practice.
    """

    masks: MaskSource = option(MaskSource.stochastic, "unmasked | ci | stochastic | binomial")
    n_samples: int = option(1, "independent draws of masks and routes per batch", ge=1)

    def columns(self, model: DecomposedModel) -> int:
        return self.n_samples * (self.route_columns(model) + mask_columns(self.masks, model))

    def passes(self, model: DecomposedModel) -> int:
        return self.n_samples * super().passes(model)

    @property
    def is_mean(self) -> bool:
        return True

    def statistics(self, inputs: LossInputs) -> Statistics:
        total = inputs.draws.new_zeros(())
        count: Tensor | int = 0
        widths = [self.route_columns(inputs.model), mask_columns(self.masks, inputs.model)]
        for draws in inputs.draws.chunk(self.n_samples, dim=-1):
            route_draws, mask_draws = torch.split(draws, widths, dim=-1)
            drawn = mask_maker(self.masks, inputs.model, mask_draws)
            for route in self.routes(inputs.model, route_draws):
                divergence, size = masked_divergence(inputs, drawn, route)
                total = total + divergence
                count = count + size
        return {"sum": total, "count": total.new_zeros(()) + count}


def mask_columns(source: MaskSource, model: DecomposedModel) -> int:
    """Random numbers per position that `mask_maker` takes."""
    return sum(masks.columns_needed(source, shape.C) for shape in model.site_shapes().values())


def mask_maker(
    source: MaskSource, model: DecomposedModel, draws: Float[Tensor, "*positions columns"]
) -> MakeMask:
    """One draw of masks for every site, made of its causal importances."""
    widths = [masks.columns_needed(source, shape.C) for shape in model.site_shapes().values()]
    of_site = dict(zip(model.site_names, torch.split(draws, widths, dim=-1), strict=True))
    use_delta, sigmoid = model.config.use_delta, model.config.sigmoid

    def make(site: str, ci: CausalImportance) -> SiteMask:
        return draw_mask(source, ci, draws=of_site[site], use_delta=use_delta, sigmoid=sigmoid)

    return make


def masked_divergence(
    inputs: LossInputs, make: MakeMask, route: Route, parameters: Sequence[Tensor] = ()
) -> tuple[Tensor, Tensor | int]:
    """Divergence of one masked pass, summed over the batch, and the number it has to be divided by.

    Where `inputs.at_once` says so its gradient is taken with it, and what the pass computed on the way,
    masks included, is gone when it is over.

    Args:
        inputs: the batch.
        make: makes the mask of a site.
        route: the sites that are masked, and where.
        parameters: leaves that masks depend on beside the importances.
    """
    count = divergence_count(inputs.divergence, inputs.clean.output, inputs.valid)
    if not (inputs.at_once and torch.is_grad_enabled() and not is_mapped()):
        return _divergence(inputs, make, route), count
    given = {site: (inputs.ci[site], inputs.reuse.activations[site].inner) for site in route}
    tensors = [tensor for ci, h in given.values() for tensor in (*ci, h)]

    def divergence(own: list[Tensor]) -> Float[Tensor, ""]:
        ci, activations = dict(inputs.ci), dict(inputs.reuse.activations)
        for index, site in enumerate(given):
            *importances, h = own[4 * index : 4 * index + 4]
            ci[site] = CausalImportance(*importances)
            activations[site] = activations[site]._replace(inner=h)
        # Products of parameters that passes share would end with the first.
        reuse = inputs.reuse._replace(activations=activations, products={})
        return _divergence(dataclasses.replace(inputs, ci=ci, reuse=reuse), make, route)

    return with_gradient(divergence, [*tensors, *inputs.model.matrices(route), *parameters]), count


def _divergence(inputs: LossInputs, make: MakeMask, route: Route) -> Float[Tensor, ""]:
    at = {site: make(site, inputs.ci[site])._replace(route=where) for site, where in route.items()}
    output = inputs.model(inputs.batch, at, reuse=inputs.reuse, recompute=inputs.recompute)
    total, _ = divergence_sum(
        inputs.divergence,
        output,
        inputs.clean.output,
        inputs.valid,
        inputs.target_normaliser,
        compiled=inputs.model.compiled_blocks is not None and torch.is_grad_enabled(),
    )
    return total
