"""What masked passes show where there is no known answer: a sum that is not the weights, useless masks."""

from collections.abc import Callable, Mapping

from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.metric.finding import Finding, Settings, more_steps

# Of what all off loses. A language model that is trained to the end loses less than 0.001 of it with all on.
MUCH = 0.05
_DIVERGENCES = {"kl": "KL", "mse": "squared error"}


def ablation_findings(evaluation: Evaluation, settings: Settings) -> list[Finding]:
    """The first thing that is wrong with the masked passes; nothing where none were measured.

    Nothing is important anywhere; or all subcomponents together are not the target, so that nothing can be
    said of parts of them; or masks by causal importance lose as much as random ones, or more.
    """
    metrics = evaluation.metrics
    kind = next((kind for kind in _DIVERGENCES if metrics.get(f"{kind}/zero", 0.0) > 0), None)
    if kind is None:
        return []
    looks: list[Callable[[Mapping[str, float], str, Settings], Finding | None]] = [_nothing, _sum, _random]
    return [found for look in looks if (found := look(metrics, kind, settings)) is not None][:1]


def _nothing(metrics: Mapping[str, float], kind: str, settings: Settings) -> Finding | None:
    if settings.sparsity_coeff == 0 or any(n > 0 for name, n in metrics.items() if name.startswith("alive/")):
        return None
    coeff = settings.sparsity_coeff
    return Finding(
        symptom="no subcomponent is needed anywhere",
        advice="the coefficient is too high: "
        f"try loss.{settings.sparsity_term}.coeff={coeff / 10:g} (now {coeff:g})",
    )


def _sum(metrics: Mapping[str, float], kind: str, settings: Settings) -> Finding | None:
    unmasked, zero = metrics[f"{kind}/unmasked"], metrics[f"{kind}/zero"]
    if not unmasked > MUCH * zero:
        return None
    return Finding(
        symptom=f"the subcomponents do not sum to the weights yet: with all of them on the "
        f"{_DIVERGENCES[kind]} from the target is {unmasked:.3g}, with all off {zero:.3g}",
        advice=more_steps(settings, 4),
    )


def _random(metrics: Mapping[str, float], kind: str, settings: Settings) -> Finding | None:
    own, random, zero = (metrics[f"{kind}/{mask}"] for mask in ("ci", "random", "zero"))
    if not (own >= random and own > MUCH * zero):
        return None
    return Finding(
        symptom=f"masks by causal importance lose {_more(own, random)} random ones: {_DIVERGENCES[kind]} "
        f"{own:.3g} and {random:.3g}",
        advice=more_steps(settings, 4),
    )


def _more(own: float, random: float) -> str:
    """How much more, where it is more: from 10 % on."""
    if own < 1.1 * random:
        return "as much as"
    return f"{own / random:.2g} times as much as" if random > 0 else "more than"
