"""What single features show at one site: causal importances that are missing, too many, shared or split."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from spd_hydra.counted import counted
from spd_hydra.metric.evaluation import Evaluation, FloatArray, SiteCheck
from spd_hydra.metric.finding import Finding, Settings, listed, more_restarts, more_steps, values
from spd_hydra.metric.known_answer import TOLERANCE
from spd_hydra.metric.symptoms import identity_symptoms, lone, needed

# Local minima have up to 1.8 subcomponents on per feature; a coefficient a tenth of the preset's gives 3.
SEVERAL = 2.0
# Solved runs have an L0 of 0.7 to 1.4 times the ideal one: weak inputs fall below the threshold of g, and
# interference lies above it.
FAR_ABOVE_IDEAL = 2.0
FACTOR, LARGE_FACTOR = 2, 10  # of a change; the large one where a factor of two would change little
ADVERSARY = "loss.pgd_recon_subset.coeff"
# Of resid_mlp2's preset. With more, a site that should have a subcomponent for each feature kept one,
# for long or for good, that nearly all of them need.
FIRST_ADVERSARY = 0.4


@dataclass(frozen=True, kw_only=True)
class Case:
    """A finding at one site with its strength: the share of features or subcomponents that show it.

    Two of one `kind` say the same of their sites.
    """

    strength: float
    kind: str
    finding: Finding


def worst(
    measure: Callable[[Evaluation, SiteCheck, Settings], Case | None],
    evaluation: Evaluation,
    checks: Sequence[SiteCheck],
    settings: Settings,
) -> Case | None:
    """The strongest case among the sites, which also names those like it; None where no site is one."""
    cases = [case for check in checks if (case := measure(evaluation, check, settings)) is not None]
    if not cases:
        return None
    strongest = max(cases, key=lambda case: case.strength)
    others = [
        str(case.finding.site) for case in cases if case is not strongest and case.kind == strongest.kind
    ]
    also = f" (likewise at {listed(others)})" if others else ""
    finding = dataclasses.replace(strongest.finding, symptom=strongest.finding.symptom + also)
    return dataclasses.replace(strongest, finding=finding)


def too_high(evaluation: Evaluation, check: SiteCheck, settings: Settings) -> Case | None:
    """Features that nothing is important for, or a dense site that needs too few subcomponents."""
    g, coeff, kind = _probe(evaluation, check), settings.sparsity_coeff, check.name
    seen = identity_symptoms(g) if check.name == "identity" else None
    missing = len(seen.unserved) if seen else check.expected - needed(g, check.expected)
    if missing <= 0 or coeff == 0:
        return None
    if seen:
        symptom = (
            f"{listed(seen.unserved, 'feature')} {'has' if missing == 1 else 'have'} no subcomponent with "
            f"g ≥ {1 - TOLERANCE:g} (largest {seen.largest:.3g})"
        )
    else:
        symptom = _dense_symptom(evaluation, check)
    factor = FACTOR
    if g.max() <= TOLERANCE:
        symptom = f"no subcomponent is needed by any feature (largest g {g.max():.2f})"
        factor, kind = LARGE_FACTOR, "none"
    advice = f"the coefficient is too high: try {_sparsity(settings)}={coeff / factor:g} (now {coeff:g})"
    return _case(missing / check.expected, check, symptom, advice, kind)


def too_low(evaluation: Evaluation, check: SiteCheck, settings: Settings) -> Case | None:
    """Features with several subcomponents each, an L0 far above the ideal one, a dense site with too many."""
    g, coeff = _probe(evaluation, check), settings.sparsity_coeff
    signs: dict[str, str] = {}
    factor = FACTOR
    if check.name == "identity":
        seen = identity_symptoms(g)
        l0, ideal = (evaluation.metrics.get(f"{name}/{check.site}") for name in ("l0", "l0_ideal"))
        strength = len(seen.split) / len(g)
        if seen.per_feature >= SEVERAL:
            per_feature = f"{seen.per_feature:.2g} subcomponents with g > {TOLERANCE:g} per feature, not 1"
            signs["per feature"] = per_feature
        if l0 is not None and ideal and l0 >= FAR_ABOVE_IDEAL * ideal:
            signs["L0"] = f"L0 {l0:.3g}, ideally {ideal:.3g}"
            factor = LARGE_FACTOR if l0 >= FAR_ABOVE_IDEAL**2 * ideal else FACTOR
    else:
        surplus = needed(g, check.expected) - check.expected
        strength = min(surplus / check.expected, 1.0)
        # A higher coefficient favours those that serve one feature alone.
        is_told = 2 * len(lone(g, check.expected)) >= surplus
        signs |= {} if is_told else {"needed": _dense_symptom(evaluation, check)}
    if not signs:
        return None
    wanted = f"{_sparsity(settings)}={factor * coeff if coeff else 1e-3:g} (now {coeff:g})"
    advice = f"the coefficient is too low: try {wanted}"
    return _case(strength, check, "; ".join(signs.values()), advice, ", ".join(signs))


def shared(evaluation: Evaluation, check: SiteCheck, settings: Settings) -> Case | None:
    """Features that share a subcomponent."""
    found = identity_symptoms(_probe(evaluation, check)).shared if check.name == "identity" else []
    if not found:
        return None
    first = found[0]
    adversary = settings.adversary_coeff
    if adversary > 0 and len(first.features) > check.expected / 2:
        most = f"{len(first.features)} of {check.expected} features"
        symptom = f"subcomponent {first.subcomponent} is needed by {most}"
        advice = f"the adversary is too strong: try {ADVERSARY}={adversary / FACTOR:g} (now {adversary:g})"
        return _case(len(first.features) / check.expected, check, symptom, advice, "by most")
    more = f", and {len(found) - 1} more such" if len(found) > 1 else ""
    who = f"{listed(first.features, 'feature')} share subcomponent {first.subcomponent}"
    strength = sum(len(one.features) for one in found) / check.expected
    return _case(strength, check, f"{who} ({values(first.g)}){more}", more_restarts(settings))


def split(evaluation: Evaluation, check: SiteCheck, settings: Settings) -> Case | None:
    """Features that need more than one subcomponent."""
    found = identity_symptoms(_probe(evaluation, check)).split if check.name == "identity" else []
    if not found:
        return None
    first = found[0]
    more = f", and {len(found) - 1} more such" if len(found) > 1 else ""
    over = listed(first.subcomponents, "subcomponent")
    symptom = f"feature {first.feature} is split over {over} ({values(first.g)}){more}"
    # A second one that is near 1 stays; one on its way down needs time.
    is_settled = any(sorted(one.g)[-2] >= 1 - TOLERANCE for one in found)
    advice = more_restarts(settings) if is_settled else more_steps(settings, FACTOR)
    return _case(len(found) / check.expected, check, symptom, advice)


def alone(evaluation: Evaluation, check: SiteCheck, settings: Settings) -> Case | None:
    """Subcomponents of a dense site that serve one feature each, in place of those that many share."""
    found = lone(_probe(evaluation, check), check.expected) if check.name == "dense" else []
    if not found:
        return None
    first, adversary = found[0], settings.adversary_coeff
    more = f", and {len(found) - 1} more such" if len(found) > 1 else ""
    symptom = (
        f"subcomponent {first.subcomponent} serves feature {first.feature} alone (g {first.g:.2f}), in place "
        f"of the {check.expected} that features share{more}"
    )
    wanted = FACTOR * adversary or FIRST_ADVERSARY
    advice = f"an adversary takes such away: try {ADVERSARY}={wanted:g} (now {adversary:g})"
    return _case(len(found) / check.expected, check, symptom, advice)


def _sparsity(settings: Settings) -> str:
    return f"loss.{settings.sparsity_term}.coeff"


def _dense_symptom(evaluation: Evaluation, check: SiteCheck) -> str:
    found = needed(_probe(evaluation, check), check.expected)
    alive = evaluation.metrics.get(f"alive/{check.site}")
    also = "" if alive is None else f" ({alive:.0f} alive)"
    is_needed = f"{counted(found, 'subcomponent')} {'is' if found == 1 else 'are'} needed"
    return f"{is_needed}{also}, not {check.expected}"


def _case(strength: float, check: SiteCheck, symptom: str, advice: str, kind: str = "") -> Case:
    finding = Finding(symptom=f"{check.site}: {symptom}", advice=advice, site=check.site)
    return Case(strength=strength, kind=kind, finding=finding)


def _probe(evaluation: Evaluation, check: SiteCheck) -> FloatArray:
    g = evaluation.sites[check.site].probe_lower
    assert g is not None, "a site with a check has a probe"
    return g
