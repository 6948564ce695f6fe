"""The training loss as a pure function of parameters, batch, random key and schedule."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from spd_hydra import distributed, rng
from spd_hydra.decomposition.clean_pass import Reuse
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import SiteMask
from spd_hydra.loss.ascent import Sources, Values
from spd_hydra.loss.base import Loss, LossInputs, Statistics, mean
from spd_hydra.loss.divergence import Divergence, log_normaliser
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.persistent_recon import Adversary
from spd_hydra.precision import Precision
from spd_hydra.transfer import send

ScheduledValues = dict[str, dict[str, Tensor]]
"""Scheduled parameters at one step: by term, by parameter, as scalars on the device."""


SPARSITY = "sparsity"
"""Stands beside the names of the terms, for the sums of `Objective.sparsity`."""

POSITIONS = "positions"


class StepLoss(NamedTuple):
    """The loss of one step: `total` = Σ weight · term, every active term, and L0 per site."""

    total: Float[Tensor, ""]
    terms: dict[str, Float[Tensor, ""]]
    l0: dict[str, Float[Tensor, ""]]

    def numbers(self) -> dict[str, float]:
        """All of them as numbers, by the names of the metrics log. Waits for the device."""
        losses = {"loss/total": self.total} | {f"loss/{name}": value for name, value in self.terms.items()}
        l0 = {f"l0/{site}": value for site, value in self.l0.items()}
        found = _numbers(losses | l0)
        return found | {"l0/total": sum(found[site] for site in l0)}

    def summary(self) -> dict[str, float]:
        """What is shown of them while training goes on. Waits for the device."""
        found = _numbers({"": self.total} | self.l0)
        return {"loss": found.pop(""), "L0": sum(found.values())}


def _numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    """Numbers on a device, for which it is waited once."""
    found: list[float] = torch.stack([value.detach().double() for value in values.values()]).tolist()
    return dict(zip(values, found, strict=True))


class Objective:
    """Computes loss terms on a batch.

    Args:
        model: the decomposed model.
        losses: all terms with their coefficients.
        precision: of the forward passes.
        ci_threshold: g above which a subcomponent counts as active in L0.
        padded: batches are tokens, of which negative ones are padding.
        recompute: masked passes keep the inputs of blocks alone, which the backward pass computes again.
        seed: where lasting adversaries start.

    Attributes:
        adversary: lasting sources of the active terms that have some.
    """

    def __init__(
        self,
        model: DecomposedModel,
        losses: LossSet,
        *,
        precision: Precision,
        ci_threshold: float,
        padded: bool = False,
        recompute: bool = False,
        seed: int = 0,
    ) -> None:
        self.model = model
        assert losses.divergence is not Divergence.auto, "a whole configuration has settled it"
        self.losses = losses
        self.precision = precision
        self.ci_threshold = ci_threshold
        self.padded = padded
        self.recompute = recompute
        self.adversary = Adversary(model, losses.lasting_terms(), seed=seed)

    def __call__(
        self,
        batch: Tensor,
        draws: Float[Tensor, "*positions columns"],
        schedule: ScheduledValues,
    ) -> StepLoss:
        """The training loss on one batch.

        Args:
            batch: input of the target.
            draws: random numbers in the columns that the active terms take.
            schedule: what `scheduled` gives.
        """
        inputs = self.inputs(batch)
        active = self.losses.active_terms()
        statistics = self.statistics(inputs, active, draws, schedule)
        statistics[SPARSITY] = self.sparsity(inputs)
        return self.loss_of(over_ranks(statistics))

    def loss_of(self, statistics: Mapping[str, Statistics]) -> StepLoss:
        """The training loss, from sums over the whole batch: of all active terms, and of `sparsity`."""
        active = self.losses.active_terms()
        sparsity = dict(statistics[SPARSITY])
        positions = sparsity.pop(POSITIONS)
        terms = {name: term.value(statistics[name], positions) for name, term in active.items()}
        total = torch.stack(
            [term.weight(statistics[name]) * terms[name] for name, term in active.items()]
        ).sum()
        l0 = {site: mean(active, positions) for site, active in sparsity.items()}
        return StepLoss(total, {name: term.detach() for name, term in terms.items()}, l0)

    @property
    def block_runs(self) -> int:
        """Runs of blocks with a backward pass in a step, at most: how large the graph of a whole step is."""
        passes = sum(term.passes(self.model) for term in self.losses.active_terms().values())
        return passes * self.model.patched.n_blocks

    def against(self, batch: Tensor, draws: Float[Tensor, "*positions columns"]) -> dict[str, Statistics]:
        """What the adversary climbs: the statistics, on some rows, of the terms that have lasting sources.

        Args:
            batch: input of the target.
            draws: as for the training loss.
        """
        terms = self.adversary.terms
        own = self.draws_of(self.losses.active_terms(), draws)
        draws = torch.cat([own[name] for name in terms], dim=-1)
        return self.statistics(self.inputs(batch), terms, draws, {})

    def look(
        self,
        term: str,
        batch: Tensor,
        draws: Float[Tensor, "*positions columns"],
        r: Sources,
        *,
        wants_slopes: bool,
    ) -> tuple[Values, Sources]:
        """What some rows contribute to the divergence of a searching term at sources r, and to its gradient.

        Args:
            term: name of one of `LossSet.searching_terms`.
            batch: input of the target.
            draws: as for the training loss.
            r: by site.
            wants_slopes: else no gradient is taken.
        """
        own = self.draws_of(self.losses.active_terms(), draws)[term]
        inputs = dataclasses.replace(self.inputs(batch), draws=own)
        with self._autocast():
            return self.losses.searching_terms()[term].look(inputs, r, wants_slopes=wants_slopes)

    def start_of_search(self, term: str, draws: Float[Tensor, "*positions columns"]) -> Sources:
        """Where a searching term's ascent begins, from the draws of the first rows of each rank."""
        own = self.draws_of(self.losses.active_terms(), draws)[term]
        return self.losses.searching_terms()[term].start_sources(self.model, own)

    def draws_of(
        self, terms: Mapping[str, Loss], draws: Float[Tensor, "*positions columns"]
    ) -> dict[str, Tensor]:
        """Each term's own columns of the draws for all of them."""
        widths = [term.columns(self.model) for term in terms.values()]
        return dict(zip(terms, torch.split(draws, widths, dim=-1), strict=True))

    def columns(self, terms: Mapping[str, Loss]) -> Int32[Tensor, " columns"]:
        """What random numbers the given terms take per position, in that order, as columns of `rng.uniform`.

        They are drawn apart from the loss: so the loss stays a pure function, and compiles in seconds where
        the integer arithmetic of the draws, repeated in every kernel, took minutes.
        """
        return torch.cat([rng.columns(name, term.columns(self.model)) for name, term in terms.items()])

    def inputs(self, batch: Tensor) -> LossInputs:
        """The clean pass and the causal importances of a batch, which all terms share."""
        valid = batch >= 0 if self.padded else None
        with self._autocast():
            clean = self.model.clean_pass(batch)
            activations = self.model.activations(clean)
            ci = self.model.importances(activations, valid=valid)
        is_kl = self.losses.divergence is Divergence.kl
        return LossInputs(
            model=self.model,
            batch=batch,
            reuse=Reuse(clean, activations, products={}),
            ci=ci,
            draws=torch.zeros((), device=batch.device),
            divergence=self.losses.divergence,
            schedule={},
            target_normaliser=log_normaliser(clean.output) if is_kl else None,
            # Not for toys, with one position per row: their activations are small.
            at_once=clean.output.dim() > 2 and not self.model.patched.shares_products,
            recompute=self.recompute,
            valid=valid,
        )

    def output(self, inputs: LossInputs, masks: Mapping[str, SiteMask]) -> Tensor:
        """The output of a masked pass on a batch, in the precision of training."""
        with self._autocast():
            return self.model(inputs.batch, masks, reuse=inputs.reuse)  # type: ignore[no-any-return]

    def statistics(
        self,
        inputs: LossInputs,
        terms: Mapping[str, Loss],
        draws: Float[Tensor, "*positions columns"],
        schedule: ScheduledValues,
        found_sources: Mapping[str, Sources] | None = None,
    ) -> dict[str, Statistics]:
        """The additive statistics of the given terms on one batch, with draws in the columns they take.

        Args:
            inputs: the batch.
            terms: by name.
            draws: for all of them.
            schedule: what `scheduled` gives.
            found_sources: of searching terms whose ascent is over, because this is a part of its batch.
        """
        sources = found_sources or {}
        found = {}
        own_draws = self.draws_of(terms, draws)
        for name, term in terms.items():
            own = dataclasses.replace(
                inputs,
                draws=own_draws[name],
                schedule=schedule.get(name, {}),
                sources=sources.get(name) or self.adversary.of(name),
            )
            with self._autocast():
                found[name] = term.statistics(own)
        return found

    def scheduled(self, progress: float, terms: Mapping[str, Loss] | None = None) -> ScheduledValues:
        """Parameters of the terms that change during training, at `progress` in [0, 1].

        Args:
            progress: fraction of training done.
            terms: None: those that every evaluation measures.
        """
        device = self.model.device
        return {
            name: {parameter: send(torch.tensor(value), device) for parameter, value in own.items()}
            for name, own in self.schedule(progress, terms).items()
        }

    def schedule(
        self, progress: float, terms: Mapping[str, Loss] | None = None
    ) -> dict[str, dict[str, float]]:
        """The same as numbers; which parameters they are never changes."""
        chosen = self.losses.measured_terms() if terms is None else terms
        values = {name: term.scheduled(progress) for name, term in chosen.items()}
        return {name: own for name, own in values.items() if own}

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.model.device.type, dtype=torch.bfloat16, enabled=self.precision is Precision.bf16
        )

    def sparsity(self, inputs: LossInputs) -> Statistics:
        """Number of active subcomponents by site, summed over positions, and the number of `POSITIONS`."""
        with torch.no_grad():
            active = {
                site: _counted(ci.lower > self.ci_threshold, inputs.valid) for site, ci in inputs.ci.items()
            }
        return active | {POSITIONS: inputs.n_positions}


def _counted(
    active: Bool[Tensor, "*positions C"], valid: Bool[Tensor, "*positions"] | None
) -> Float[Tensor, ""]:
    counted = active if valid is None else active & valid[..., None]
    return counted.sum(dtype=torch.float32)


def over_ranks(statistics: dict[str, Statistics]) -> dict[str, Statistics]:
    """Statistics of all rows, from those of this rank's rows."""
    if distributed.world_size() == 1:
        return statistics
    keys = [(name, key) for name, own in statistics.items() for key in own]
    sums = distributed.global_sum([statistics[name][key] for name, key in keys])
    found: dict[str, Statistics] = {name: {} for name in statistics}
    for (name, key), value in zip(keys, sums, strict=True):
        found[name][key] = value
    return found
