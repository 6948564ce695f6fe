"""What is wrong with a run that is not solved, in words, and what to change: the likeliest cause first."""

from collections.abc import Sequence

from spd_hydra.metric import symptoms
from spd_hydra.metric.ablation_findings import ablation_findings
from spd_hydra.metric.evaluation import Evaluation, SiteCheck
from spd_hydra.metric.finding import Finding, Settings, listed, more_restarts, more_steps
from spd_hydra.metric.known_answer import LEAST_MMCS, TOLERANCE
from spd_hydra.metric.site_findings import alone, shared, split, too_high, too_low, worst

MOST_FINDINGS = 6
UNDECIDED = 1.0  # per feature; 0.4 in local minima at the end of training, 1.4 after a twentieth of it
SCARCELY_ANY = 0.5  # of the ideal L0: where so little is left, more steps would only take more away
MOST = 0.5  # a share: more than half of the features is no accident of one initialisation


def diagnose(evaluation: Evaluation, history: symptoms.Rows, settings: Settings) -> list[Finding]:
    """Why a run is not solved, the likeliest cause first; empty for a solved one.

    A cause leaves out what it would bring about itself: nothing counts on a bad target; with too few
    subcomponents some have to be shared; before the end of training causal importances are still too many.
    While most are undecided, a feature without a subcomponent says nothing of the coefficient.
    Of a coefficient too high and too low the stronger case is told. Without a known answer only what needs
    none: L0 that still falls, a jump of the gradient, what masked passes lose.

    Args:
        evaluation: the last one.
        history: rows of metrics.jsonl.
        settings: what the run was given.
    """
    if evaluation.solved:
        return []
    is_known = evaluation.solved is not None
    if is_known and not settings.certified:
        return [_bad_target(settings)]
    found = _jump(history, settings)
    if is_known and (few := _too_few(evaluation, settings)):
        return [*found, *few][:MOST_FINDINGS]
    checks = _failed(evaluation) if is_known else []
    undecided = _undecided(evaluation, checks)
    undertrained = _undertrained(evaluation, history, undecided, settings)
    if not is_known:
        return [*found, *(undertrained or ablation_findings(evaluation, settings))]
    found += undertrained
    if not undertrained:
        found += _of_sites(evaluation, checks, settings)
    elif undecided < UNDECIDED:  # else too early to tell which features will have a subcomponent
        found += _mostly_lost(evaluation, checks, settings)
    if not found and (missed := _no_direction(evaluation, settings)):
        return [missed]
    return (found or [_near_miss(evaluation, checks, settings)])[:MOST_FINDINGS]


def _mostly_lost(evaluation: Evaluation, checks: Sequence[SiteCheck], settings: Settings) -> list[Finding]:
    """A coefficient that is too high for most features: what a training that goes on does not mend."""
    high = worst(too_high, evaluation, checks, settings)
    return [high.finding] if high is not None and high.strength > MOST else []


def _of_sites(evaluation: Evaluation, checks: Sequence[SiteCheck], settings: Settings) -> list[Finding]:
    """What the sites show at the end of a training, the strongest first."""
    high, low, common = (worst(one, evaluation, checks, settings) for one in (too_high, too_low, shared))
    sides = [case for case in (high, low) if case is not None]
    coefficient = max(sides, key=lambda case: case.strength, default=None)
    if coefficient is not None and coefficient.strength > MOST:
        return [coefficient.finding]
    lone = worst(alone, evaluation, checks, settings)
    if common is None and coefficient is None:
        common = worst(split, evaluation, checks, settings)
    told = [case for case in (coefficient, common, lone) if case is not None]
    return [case.finding for case in sorted(told, key=lambda case: -case.strength)]


def _failed(evaluation: Evaluation) -> list[SiteCheck]:
    """The checks that decide and fail."""
    return [check for check in evaluation.checks if check.tolerance == TOLERANCE and check.error > 0]


def _bad_target(settings: Settings) -> Finding:
    bad = ", ".join(f"{one.name} {one.value:.3g}" for one in settings.measurements if not one.passed)
    tries = settings.max_tries
    advice = "try another seed"
    if settings.short_target is not None:
        advice = (
            f"target_steps, as debug=smoke sets it, trained the target in one try of {settings.short_target} "
            "steps only, so it is not meant to be certified: leave out debug=smoke or target_steps"
        )
    elif tries is not None:
        advice = f"try model.training.max_tries={2 * tries} (now {tries}), or another seed"
    why = f" (out of bounds: {bad})" if bad else ""
    return Finding(
        symptom=f"the target is not certified{why}, so its decomposition proves nothing", advice=advice
    )


def _jump(history: symptoms.Rows, settings: Settings) -> list[Finding]:
    jump = symptoms.jump_of_gradient(history)
    if jump is None:
        return []
    symptom = (
        f"training became unstable: the gradient norm of the ci_fn is {jump.last:.2g} in the last rows, "
        f"{jump.last / jump.median:,.0f} times its median {jump.median:.2g}"
    )
    if settings.clip_ci_fn is None:
        advice = f"try train.clip_ci_fn={10 * jump.median:.1g} (now null)"
    else:
        advice = f"try train.lr={settings.lr / 2:g} (now {settings.lr:g})"
    return [Finding(symptom=symptom, advice=advice)]


def _too_few(evaluation: Evaluation, settings: Settings) -> list[Finding]:
    """Sites with fewer subcomponents than the known answer has; tied ones together."""
    groups: dict[str, list[SiteCheck]] = {}
    for check in evaluation.checks:
        if check.tolerance == TOLERANCE and settings.sites[check.site][1] < check.expected:
            groups.setdefault(settings.tied.get(check.site, check.site), []).append(check)
    found = []
    for source, checks in groups.items():
        expected, C = max(check.expected for check in checks), settings.sites[source][1]
        # Twice as many: from an exact number every single initial direction would have to find its feature.
        together = [source, *(site for site, of in settings.tied.items() if of == source)]
        keys = dict.fromkeys(f"decomposition.sites.{settings.sites[site][0]}.C" for site in together)
        found.append(
            Finding(
                symptom=f"{listed([check.site for check in checks])}: {C} subcomponents where the known "
                f"answer has {expected}",
                advice=f"try {' '.join(f'{key}={2 * expected}' for key in keys)} (now {C})",
                site=checks[0].site,
            )
        )
    return found


def _undecided(evaluation: Evaluation, checks: Sequence[SiteCheck]) -> float:
    """Causal importances per feature that are neither on nor off, at the worst identity site."""
    probes = [evaluation.sites[check.site].probe_lower for check in checks if check.name == "identity"]
    return max((symptoms.identity_symptoms(g).undecided for g in probes if g is not None), default=0.0)


def _undertrained(
    evaluation: Evaluation, history: symptoms.Rows, undecided: float, settings: Settings
) -> list[Finding]:
    """L0 still falls, or most features have causal importances that are neither on nor off.

    A fall counts only under a loss that stays: under one that moves to the end L0 never comes to rest.
    """
    signs = []
    fall = None if settings.anneals_late else symptoms.fall_of_l0(history)
    ideal = sum(value for name, value in evaluation.metrics.items() if name.startswith("l0_ideal/"))
    if fall is not None and fall.last > SCARCELY_ANY * ideal:
        signs.append(
            f"L0 still falls: {fall.first:.3g} at step {fall.first_step:,}, {fall.last:.3g} at step "
            f"{fall.last_step:,}, {fall.share:.0%} per quarter of training"
        )
    if undecided >= UNDECIDED:
        signs.append(
            f"{undecided:.2g} causal importances per feature are neither on nor off "
            f"({TOLERANCE:g} to {1 - TOLERANCE:g})"
        )
    if not signs:
        return []
    # Undecided causal importances are those of the first tenth of a training, a falling L0 those of its end.
    factor = 4 if undecided >= UNDECIDED else 2
    return [Finding(symptom="; ".join(signs), advice=more_steps(settings, factor))]


def _no_direction(evaluation: Evaluation, settings: Settings) -> Finding | None:
    """The feature that the subcomponents' directions miss most."""
    for site, found in evaluation.sites.items():
        best = symptoms.best_cosines(found)
        low = [int(j) for j in (best < symptoms.LEAST_COSINE).nonzero()[0]]
        if low and evaluation.mmcs is not None and evaluation.mmcs < LEAST_MMCS:
            worst = min(low, key=lambda j: float(best[j]))
            more = f", and {len(low) - 1} more such" if len(low) > 1 else ""
            return Finding(
                symptom=f"{site}: no subcomponent points in the direction of feature {worst} "
                f"(largest cosine {best[worst]:.2f}){more}",
                advice=more_restarts(settings),
                site=site,
            )
    return None


def _near_miss(evaluation: Evaluation, checks: Sequence[SiteCheck], settings: Settings) -> Finding:
    """Nothing stands out: what the verdict counts is little, or the subcomponents' sizes are off."""
    size = "" if evaluation.ml2r is None else f", ML2R {evaluation.ml2r:.3g}"
    where = ", ".join(f"{check.site} {check.error}" for check in checks) or "none"
    return Finding(
        symptom=f"no single cause stands out (wrong entries: {where}{size})",
        advice=f"{more_steps(settings, 2)}; then {more_restarts(settings)}",
    )
