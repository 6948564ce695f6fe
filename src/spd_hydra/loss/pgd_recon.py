"""Adversarial reconstruction: the output has to stay that of the target under the worst masks found."""

import dataclasses
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from spd_hydra.ci_fn.base import SiteActivation
from spd_hydra.ci_fn.sigmoid import CausalImportance
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import mask_from_sources
from spd_hydra.loss import ascent
from spd_hydra.loss.ascent import Scope, Sources, Start, start_sources, worst_sources
from spd_hydra.loss.base import LossInputs, Statistics
from spd_hydra.loss.divergence import divergence_by_row
from spd_hydra.loss.recon import MakeMask, Route, RoutedRecon, masked_divergence
from spd_hydra.section import option


@dataclasses.dataclass(kw_only=True)
class PGDRecon(RoutedRecon):
    """Mean divergence between the target's output and that of passes with adversarial masks.

    Masks are m = g + (1 - g)·r, with sources r (and δ of the weight delta) found by projected gradient ascent
    on the divergence: from `start`, `n_steps` times r ← clamp(r + step_size · sign(∂D/∂r), 0, 1); the worst
    point seen counts, so the value is never below that of the start. Routes are drawn once per batch, before
    the ascent, which is one of its own for each masked pass (layerwise: for each site). Mean over sites if
    layerwise, and over what the divergence averages. Range: ≥ 0. Later practice.

    The gradient is that of the divergence at the sources that were found, held fixed. A batch costs
    n_steps + 1 forward and n_steps backward passes beside that of the term itself.
    """

    always_measured = False  # several passes

    n_steps: int = option(1, "steps of ascent; 0: the sources stay at their start", ge=0)
    step_size: float = option(1.0, "length of a step of each source, which lie in [0, 1]", gt=0, le=1)
    start: Start = option(Start.random, "random | ones | zeros: where the sources begin")
    scope: Scope = option(
        Scope.shared, "shared: the same sources at all positions of the batch | per_datapoint"
    )

    def columns(self, model: DecomposedModel) -> int:
        return self.route_columns(model) + ascent.columns_needed(model, self.start, self.scope)

    def passes(self, model: DecomposedModel) -> int:
        return (self.n_steps + 1) * super().passes(model)

    @property
    def is_mean(self) -> bool:
        return True

    @property
    def needs_whole_batch(self) -> bool:
        return self.scope is Scope.shared

    def statistics(self, inputs: LossInputs) -> Statistics:
        route_draws, own_draws = inputs.draws.tensor_split([self.route_columns(inputs.model)], dim=-1)
        return adversarial_recon(
            inputs,
            self.routes(inputs.model, route_draws),
            start_sources(inputs, self.start, self.scope, own_draws),
            n_steps=self.n_steps,
            step_size=self.step_size,
            scope=self.scope,
        )


def adversarial_recon(
    inputs: LossInputs,
    routes: Sequence[Route],
    start: Sources,
    *,
    n_steps: int,
    step_size: float,
    scope: Scope,
) -> Statistics:
    """Divergence under the worst masks that `n_steps` of ascent find, as `sum` and `count` over the batch.

    Works where nothing is recorded for gradients (evaluation), in a compiled step, and mapped over replicas.

    Args:
        inputs: the batch; its draws are not used.
        routes: the masked passes, each with an ascent of its own.
        start: sources of every site, see `start_sources`.
        n_steps: steps of ascent.
        step_size: length of a step.
        scope: whether sources are shared by the positions of the global batch.
    """
    fixed = _fixed(inputs)
    total = inputs.draws.new_zeros(())
    count: Tensor | int = 0
    for route in routes:

        def divergence(r: Sources, route: Route = route) -> Float[Tensor, " rows"]:
            # What a pass without gradients leaves in the products would be missed by those with.
            reuse = fixed.reuse._replace(products=dict(fixed.reuse.products))
            make = _maker(fixed.model, r)
            masks = {site: make(site, fixed.ci[site])._replace(route=where) for site, where in route.items()}
            output = fixed.model(fixed.batch, masks, reuse=reuse, recompute=fixed.recompute, for_masks=True)
            return divergence_by_row(
                fixed.divergence, output, fixed.clean.output, fixed.valid, fixed.target_normaliser
            )

        found = worst_sources(
            divergence,
            {site: start[site] for site in route},
            n_steps=n_steps,
            step_size=step_size,
            scope=scope,
        )
        own, size = masked_divergence(inputs, _maker(inputs.model, found), route)
        total = total + own
        count = count + size
    return {"sum": total, "count": total.new_zeros(()) + count}


def _maker(model: DecomposedModel, sources: Sources) -> MakeMask:
    return lambda site, ci: mask_from_sources(ci, sources[site], use_delta=model.config.use_delta)


def _fixed(inputs: LossInputs) -> LossInputs:
    """The same batch with importances and inner activations through which no gradient passes."""
    ci = {site: CausalImportance(*(part.detach() for part in own)) for site, own in inputs.ci.items()}
    activations = {
        site: SiteActivation(own.input, own.inner.detach()) for site, own in inputs.reuse.activations.items()
    }
    return dataclasses.replace(inputs, ci=ci, reuse=inputs.reuse._replace(activations=activations))
