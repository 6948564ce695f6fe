"""Reconstruction: with masks on, the output has to stay that of the target."""

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spd_hydra.decomposition import masks, routing
from spd_hydra.decomposition.decomposed_model import DecomposedModel, Reuse
from spd_hydra.decomposition.masks import MaskSource, SiteMask, draw_mask
from spd_hydra.decomposition.routing import Routing, routes
from spd_hydra.loss.base import Loss, LossInputs, Statistics
from spd_hydra.loss.divergence import divergence_sum
from spd_hydra.section import option


@dataclasses.dataclass(kw_only=True)
class Recon(Loss):
    """Mean divergence between the target's output and that of masked passes.

    One point of the grid {unmasked, ci, stochastic, binomial} × {all, layerwise, subset}. Mean over
    `n_samples` draws, over sites if layerwise, and over what the divergence averages. Range: ≥ 0.
    Paper, §2.2 (stochastic, all and layerwise); the rest is later practice.
    """

    masks: MaskSource = option(MaskSource.stochastic, "unmasked | ci | stochastic | binomial")
    routing: Routing = option(Routing.all, "all | layerwise | uniform_k | static: sites masked together")
    n_samples: int = option(1, "independent draws of masks and routes per batch", ge=1)
    probability: float = option(0.5, "chance that a site is masked, for routing=static", gt=0, le=1)

    def columns(self, model: DecomposedModel) -> int:
        return self.n_samples * sum(self._widths(model))

    def _widths(self, model: DecomposedModel) -> list[int]:
        """Columns of one sample: those of the routing, then those of each site's mask."""
        shapes = model.site_shapes().values()
        return [
            routing.columns_needed(self.routing, len(shapes)),
            *(masks.columns_needed(self.masks, shape.C) for shape in shapes),
        ]

    @property
    def is_mean(self) -> bool:
        return True

    def statistics(self, inputs: LossInputs) -> Statistics:
        model = inputs.model
        total = inputs.draws.new_zeros(())
        count: Tensor | int = 0
        for draws in inputs.draws.chunk(self.n_samples, dim=-1):
            route_draws, *mask_draws = torch.split(draws, self._widths(model), dim=-1)
            site_masks = {
                site: draw_mask(
                    self.masks,
                    inputs.ci[site],
                    draws=site_draws,
                    use_delta=model.config.use_delta,
                    sigmoid=model.config.sigmoid,
                )
                for site, site_draws in zip(model.site_names, mask_draws, strict=True)
            }
            for routed in routes(
                self.routing, model.site_names, draws=route_draws, probability=self.probability
            ):
                chosen = {site: site_masks[site]._replace(route=route) for site, route in routed.items()}
                divergence, size = masked_divergence(inputs, chosen)
                total = total + divergence
                count = count + size
        return {"sum": total, "count": total.new_zeros(()) + count}


def masked_divergence(inputs: LossInputs, masks: Mapping[str, SiteMask]) -> tuple[Tensor, Tensor | int]:
    """Divergence of one masked pass, summed over the batch, and the number it has to be divided by."""

    def run(reuse: Reuse) -> tuple[Tensor, Tensor | int]:
        output = inputs.model(inputs.batch, masks, reuse=reuse)
        return divergence_sum(inputs.divergence, output, inputs.clean.output, inputs.valid)

    if not (inputs.recompute and torch.is_grad_enabled()):
        return run(inputs.reuse)
    # Products that passes share would be there already when a pass is computed again.
    found: tuple[Tensor, Tensor | int] = checkpoint(
        lambda: run(inputs.reuse._replace(products={})), use_reentrant=False, preserve_rng_state=False
    )
    return found
