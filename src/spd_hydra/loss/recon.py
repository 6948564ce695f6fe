"""Reconstruction: with masks on, the output has to stay that of the target."""

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_hydra.decomposition import masks, routing
from spd_hydra.decomposition.decomposed_model import DecomposedModel, Reuse
from spd_hydra.decomposition.masks import MaskSource, SiteMask, draw_mask
from spd_hydra.decomposition.routing import Routing, routes
from spd_hydra.loss.at_once import is_mapped, with_gradient
from spd_hydra.loss.base import Loss, LossInputs, Statistics
from spd_hydra.loss.divergence import divergence_count, divergence_sum
from spd_hydra.section import option

Route = Mapping[str, Bool[Tensor, "*positions"] | None]
"""The sites that one forward pass masks, and at which positions; None: at all of them."""


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

    @property
    def is_mean(self) -> bool:
        return True

    def statistics(self, inputs: LossInputs) -> Statistics:
        total = inputs.draws.new_zeros(())
        count: Tensor | int = 0
        widths = [self.route_columns(inputs.model), mask_columns(self.masks, inputs.model)]
        for draws in inputs.draws.chunk(self.n_samples, dim=-1):
            route_draws, mask_draws = torch.split(draws, widths, dim=-1)
            drawn = draw_masks(self.masks, inputs, mask_draws)
            for route in self.routes(inputs.model, route_draws):
                divergence, size = masked_divergence(inputs, drawn, route)
                total = total + divergence
                count = count + size
        return {"sum": total, "count": total.new_zeros(()) + count}


def mask_columns(source: MaskSource, model: DecomposedModel) -> int:
    """Random numbers per position that `draw_masks` takes."""
    return sum(masks.columns_needed(source, shape.C) for shape in model.site_shapes().values())


def draw_masks(
    source: MaskSource, inputs: LossInputs, draws: Float[Tensor, "*positions columns"]
) -> dict[str, SiteMask]:
    """One draw of masks for every site."""
    model = inputs.model
    widths = [masks.columns_needed(source, shape.C) for shape in model.site_shapes().values()]
    return {
        site: draw_mask(
            source,
            inputs.ci[site],
            draws=site_draws,
            use_delta=model.config.use_delta,
            sigmoid=model.config.sigmoid,
        )
        for site, site_draws in zip(model.site_names, torch.split(draws, widths, dim=-1), strict=True)
    }


def routed_masks(site_masks: Mapping[str, SiteMask], route: Route) -> dict[str, SiteMask]:
    """The masks of one forward pass."""
    return {site: site_masks[site]._replace(route=where) for site, where in route.items()}


def masked_divergence(
    inputs: LossInputs, site_masks: Mapping[str, SiteMask], route: Route
) -> tuple[Tensor, Tensor | int]:
    """Divergence of one masked pass, summed over the batch, and the number it has to be divided by."""
    count = divergence_count(inputs.divergence, inputs.clean.output, inputs.valid)
    at = routed_masks(site_masks, route)
    if inputs.at_once and torch.is_grad_enabled() and not is_mapped():
        return _with_gradient(inputs, at), count
    return _divergence(inputs, at, inputs.reuse), count


def _divergence(inputs: LossInputs, at: Mapping[str, SiteMask], reuse: Reuse) -> Float[Tensor, ""]:
    output = inputs.model(inputs.batch, at, reuse=reuse, recompute=inputs.recompute)
    total, _ = divergence_sum(
        inputs.divergence, output, inputs.clean.output, inputs.valid, inputs.target_normaliser
    )
    return total


def _with_gradient(inputs: LossInputs, at: Mapping[str, SiteMask]) -> Float[Tensor, ""]:
    """The same, with the gradients of the masks, of the inner activations, and of V and U."""
    reuse, activations = inputs.reuse, inputs.reuse.activations
    given = {(site, "inner"): activations[site].inner for site in at}
    given |= {
        (site, part): getattr(mask, part)
        for site, mask in at.items()
        for part in ("mask", "delta")
        if getattr(mask, part) is not None
    }

    def divergence(tensors: list[Tensor]) -> Float[Tensor, ""]:
        masks, inner = dict(at), dict(activations)
        for (site, part), tensor in zip(given, tensors[: len(given)], strict=True):
            if part == "inner":
                inner[site] = inner[site]._replace(inner=tensor)
            else:
                masks[site] = masks[site]._replace(**{part: tensor})
        return _divergence(inputs, masks, reuse._replace(activations=inner, products={}))

    return with_gradient(divergence, [*given.values(), *inputs.model.matrices(at)])
