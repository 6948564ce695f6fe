"""Adversarial reconstruction: the output has to stay that of the target under the worst masks found."""

import dataclasses
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

from spd_hydra.ci_fn.base import SiteActivation
from spd_hydra.ci_fn.sigmoid import CausalImportance
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import mask_from_sources
from spd_hydra.loss import ascent
from spd_hydra.loss.ascent import Scope, Sources, Start, Values, look_at, worst_sources
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
    def shares_sources(self) -> bool:
        """Whether the sources are the same at all positions of the batch."""
        return self.scope is Scope.shared

    def start_sources(self, model: DecomposedModel, draws: Float[Tensor, "*positions columns"]) -> Sources:
        """Where the ascent begins, from the draws of the term."""
        own = draws[..., self.route_columns(model) :]
        return ascent.start_sources(model, self.start, self.scope, own)

    def look(self, inputs: LossInputs, r: Sources, *, wants_slopes: bool) -> tuple[Values, Sources]:
        """What the rows of a batch contribute to the divergence at shared sources, and to its gradient.

        Args:
            inputs: some rows of the global batch.
            r: the sources of all sites.
            wants_slopes: else no gradient is taken.
        """
        values: Values = {}
        slopes: Sources = {}
        fixed = _fixed(inputs)
        for route in self.routes(inputs.model, inputs.draws):
            own = {site: r[site] for site in route}
            found, gradient = look_at(_by_row(fixed, route), Scope.per_datapoint)(own, wants_slopes)
            values |= {site: value.sum() for site, value in found.items()}
            slopes |= gradient
        return values, slopes

    def statistics(self, inputs: LossInputs) -> Statistics:
        # Sources that are there were found before, for the batch of which this is a part.
        start = dict(inputs.sources) or self.start_sources(inputs.model, inputs.draws)
        fixed = _fixed(inputs)
        total = inputs.draws.new_zeros(())
        count: Tensor | int = 0
        for route in self.routes(inputs.model, inputs.draws):
            found = worst_sources(
                look_at(_by_row(fixed, route), self.scope),
                {site: start[site] for site in route},
                n_steps=0 if inputs.sources else self.n_steps,
                step_size=self.step_size,
            )
            own, size = masked_divergence(inputs, _maker(inputs.model, found), route)
            total = total + own
            count = count + size
        return {"sum": total, "count": total.new_zeros(()) + count}

    def routes(self, model: DecomposedModel, draws: Float[Tensor, "*positions columns"]) -> list[Route]:
        return super().routes(model, draws[..., : self.route_columns(model)])


def _by_row(inputs: LossInputs, route: Route) -> Callable[[Sources], Float[Tensor, " rows"]]:
    """The divergence of each row, as a function of the sources of a masked pass alone."""

    def divergence(r: Sources) -> Float[Tensor, " rows"]:
        # What a pass without gradients leaves in the products would be missed by those with.
        reuse = inputs.reuse._replace(products=dict(inputs.reuse.products))
        make = _maker(inputs.model, r)
        masks = {site: make(site, inputs.ci[site])._replace(route=where) for site, where in route.items()}
        output = inputs.model(inputs.batch, masks, reuse=reuse, recompute=inputs.recompute, for_masks=True)
        return divergence_by_row(
            inputs.divergence, output, inputs.clean.output, inputs.valid, inputs.target_normaliser
        )

    return divergence


def _maker(model: DecomposedModel, sources: Sources) -> MakeMask:
    return lambda site, ci: mask_from_sources(ci, sources[site], use_delta=model.config.use_delta)


def _fixed(inputs: LossInputs) -> LossInputs:
    """The same batch with importances and inner activations through which no gradient passes."""
    ci = {site: CausalImportance(*(part.detach() for part in own)) for site, own in inputs.ci.items()}
    activations = {
        site: SiteActivation(own.input, own.inner.detach()) for site, own in inputs.reuse.activations.items()
    }
    return dataclasses.replace(inputs, ci=ci, reuse=inputs.reuse._replace(activations=activations))
