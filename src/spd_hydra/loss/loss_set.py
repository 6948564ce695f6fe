"""All terms of the training loss. Every term is always there; a coefficient of 0 switches it off."""

import dataclasses
from collections.abc import Collection, Iterator
from functools import partial

from spd_hydra.decomposition.masks import MaskSource
from spd_hydra.decomposition.routing import Routing
from spd_hydra.loss.base import Loss
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.faithfulness import Faithfulness
from spd_hydra.loss.hidden_acts_recon import HiddenActsRecon
from spd_hydra.loss.importance_minimality import ImportanceMinimality
from spd_hydra.loss.persistent_recon import PersistentPGDRecon
from spd_hydra.loss.pgd_recon import PGDRecon
from spd_hydra.loss.recon import Recon
from spd_hydra.loss.smooth_l0 import SmoothL0
from spd_hydra.section import Problem, Section, option


def _recon(masks: MaskSource, routing: Routing, meaning: str) -> Recon:
    recon: Recon = option(default_factory=partial(Recon, masks=masks, routing=routing), help=meaning)
    return recon


def _pgd(routing: Routing, meaning: str) -> PGDRecon:
    recon: PGDRecon = option(default_factory=partial(PGDRecon, routing=routing), help=meaning)
    return recon


@dataclasses.dataclass(kw_only=True)
class LossSet(Section):
    """The training loss: Σ coeff · term."""

    divergence: Divergence = option(
        Divergence.mse,
        "distance between outputs in all recon terms: auto (kl of logits, else mse) | mse | kl",
    )
    faithfulness: Faithfulness = option(
        default_factory=Faithfulness, help="mean squared entry of the weight deltas"
    )
    importance_minimality: ImportanceMinimality = option(
        default_factory=ImportanceMinimality, help="Σ of causal importances to the power p"
    )
    smooth_l0: SmoothL0 = option(default_factory=SmoothL0, help="Σ of softly counted causal importances")
    stochastic_recon: Recon = _recon(MaskSource.stochastic, Routing.all, "random masks at all sites at once")
    stochastic_recon_layerwise: Recon = _recon(
        MaskSource.stochastic, Routing.layerwise, "random masks at one site at a time"
    )
    stochastic_recon_subset: Recon = _recon(
        MaskSource.stochastic, Routing.uniform_k, "random masks at a random subset of sites per position"
    )
    ci_masked_recon: Recon = _recon(MaskSource.ci, Routing.all, "masks equal to the causal importances")
    ci_masked_recon_layerwise: Recon = _recon(
        MaskSource.ci, Routing.layerwise, "the same, one site at a time"
    )
    ci_masked_recon_subset: Recon = _recon(
        MaskSource.ci, Routing.uniform_k, "the same, random subsets of sites"
    )
    unmasked_recon: Recon = _recon(MaskSource.unmasked, Routing.all, "all subcomponents on, no weight delta")
    hidden_acts_recon: HiddenActsRecon = option(
        default_factory=HiddenActsRecon, help="outputs of all sites, under random masks at all of them"
    )
    pgd_recon: PGDRecon = _pgd(Routing.all, "the worst masks found, at all sites at once")
    pgd_recon_layerwise: PGDRecon = _pgd(Routing.layerwise, "the same, one site at a time")
    pgd_recon_subset: PGDRecon = _pgd(Routing.uniform_k, "the same, random subsets of sites")
    persistent_pgd_recon: PersistentPGDRecon = option(
        default_factory=PersistentPGDRecon, help="masks of an adversary that is trained along"
    )
    extra: dict[str, Loss] = option(default_factory=dict, help="further terms, e.g. from plug-ins")

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        own = {field.name for field in dataclasses.fields(self)}
        for name, term in self.extra.items():
            if name in own:
                yield Problem(f"extra.{name}", "has the name of another term; choose a name of its own")
            if type(term) is Loss:
                choice = f"'+loss_term@loss.extra.{name}=<term>_schema'"
                yield Problem(f"extra.{name}", f"names no term; choose the one of a plug-in: {choice}")

    def terms(self) -> dict[str, Loss]:
        """Every term by name, also those that are switched off."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: term for name, term in named.items() if isinstance(term, Loss)} | dict(self.extra)

    def active_terms(self) -> dict[str, Loss]:
        """The terms that are trained on."""
        return {name: term for name, term in self.terms().items() if term.coeff > 0}

    def measured_terms(self, also: Collection[str] = ()) -> dict[str, Loss]:
        """The terms that evaluations measure: all but those that cost much and are not trained on.

        Args:
            also: names of those to measure all the same.
        """
        return {
            name: term
            for name, term in self.terms().items()
            if term.always_measured or term.coeff > 0 or name in also
        }

    def lasting_terms(self) -> dict[str, PersistentPGDRecon]:
        """The terms that are trained on against an adversary that lasts."""
        active = self.active_terms()
        return {name: term for name, term in active.items() if isinstance(term, PersistentPGDRecon)}

    def searching_terms(self) -> dict[str, PGDRecon]:
        """The terms that are trained on whose ascent on sources looks at the whole batch."""
        active = self.active_terms()
        return {
            name: term for name, term in active.items() if isinstance(term, PGDRecon) and term.shares_sources
        }
