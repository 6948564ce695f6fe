"""The verdict: does a decomposition show the known answer of its toy target?"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from spd_hydra.ci_fn.sigmoid import CausalImportance
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.metric.evaluation import SiteCheck
from spd_hydra.metric.recovery import Recovery, recovery
from spd_hydra.metric.target_ci import Match, dense_error, identity_error
from spd_hydra.model.base import KnownAnswer

TOLERANCE = 0.2
STRICT_TOLERANCE = 0.1
LEAST_MMCS = 0.99
LARGEST_ML2R_ERROR = 0.05


class Probe(NamedTuple):
    """Causal importances of one site on each feature alone, `[n_features, C]`."""

    lower: np.ndarray
    upper: np.ndarray


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Checks at both tolerances, recovery of the columns, and what follows from them.

    `recovery` is the mean over the sites with known directions (TMS: the embedding alone), None where none of
    them is decomposed, `per_site` that of each. `order` lists subcomponents with the matched or heaviest ones
    first.
    """

    checks: list[SiteCheck]
    recovery: Recovery | None
    per_site: dict[str, Recovery]
    probes: dict[str, Probe]
    order: dict[str, np.ndarray]
    cosine_decides: bool

    def holds(self, tolerance: float) -> bool:
        """Whether every check passes at this tolerance and, where known and asked for, MMCS and ML2R too.

        Never where no site with a known answer is decomposed.
        """
        errors = [check.error for check in self.checks if check.tolerance == tolerance]
        checks_pass = bool(errors) and not any(errors)
        if not self.cosine_decides or self.recovery is None:
            return checks_pass
        cosines_pass = self.recovery.mmcs >= LEAST_MMCS and abs(self.recovery.ml2r - 1) <= LARGEST_ML2R_ERROR
        return checks_pass and cosines_pass


@torch.no_grad()
def compare(
    model: DecomposedModel, known: KnownAnswer, ci: Mapping[str, CausalImportance] | None = None
) -> Verdict:
    """Compare a decomposition with the known answer of its target.

    Args:
        model: the decomposition.
        known: the answer.
        ci: causal importances of the probe; None: taken now, in float32.
    """
    ci = model.causal_importances(known.probe.to(model.device)) if ci is None else ci
    probes = {
        site: Probe(own.lower.float().cpu().numpy(), own.upper.float().cpu().numpy())
        for site, own in ci.items()
    }
    checks: list[SiteCheck] = []
    order: dict[str, np.ndarray] = {}
    for site, kind, expected in _expectations(model, known):
        for tolerance in (STRICT_TOLERANCE, TOLERANCE):
            match = _match(kind, probes[site].lower, expected, tolerance)
            checks.append(
                SiteCheck(name=kind, site=site, tolerance=tolerance, error=match.error, expected=expected)
            )
            order[site] = match.order
    per_site = {
        site: _site_recovery(model, site, known) for site in known.directions if site in model.site_names
    }
    return Verdict(
        checks=checks,
        recovery=_mean(per_site),
        per_site=per_site,
        probes=probes,
        order=order,
        cosine_decides=known.cosine_decides,
    )


def _expectations(model: DecomposedModel, known: KnownAnswer) -> list[tuple[str, str, int]]:
    """Site, kind of check and expected number, for the sites that are decomposed."""
    found = [(site, "identity", n) for site, n in known.identity.items()]
    found += [(site, "dense", n) for site, n in known.dense.items()]
    decomposed = [item for item in found if item[0] in model.site_names]
    return sorted(decomposed, key=lambda item: model.site_names.index(item[0]))


def _match(kind: str, g: np.ndarray, expected: int, tolerance: float) -> Match:
    g = np.nan_to_num(g)  # of weights that overflowed, which no matching can sort: needed by nothing
    return identity_error(g, tolerance) if kind == "identity" else dense_error(g, expected, tolerance)


def _site_recovery(model: DecomposedModel, site: str, known: KnownAnswer) -> Recovery:
    pieces = model.pieces(site)
    directions = known.directions[site].to(model.device)
    return recovery(model.weight(site).float(), pieces.V.float(), pieces.U.float(), directions.float())


def _mean(per_site: Mapping[str, Recovery]) -> Recovery | None:
    """Mean over sites: one embedding for TMS, every layer's input matrix for ResidMLP."""
    if not per_site:
        return None
    return Recovery(*(float(np.mean(values)) for values in zip(*per_site.values(), strict=True)))
