"""One evaluation: every loss term, sparsity and the comparison with the known answer."""

from collections.abc import Collection, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from spd_hydra import distributed
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.loss.base import Loss, Statistics
from spd_hydra.loss.objective import Objective, ScheduledValues, over_ranks
from spd_hydra.metric.ablations import Ablations, AblationSettings
from spd_hydra.metric.activity import Activity
from spd_hydra.metric.contributions import agreement_metrics, neuron_contributions
from spd_hydra.metric.evaluation import Evaluation, SiteEvaluation
from spd_hydra.metric.extra import with_extra
from spd_hydra.metric.known_answer import STRICT_TOLERANCE, TOLERANCE, Verdict, compare
from spd_hydra.model.base import KnownAnswer
from spd_hydra.sampler import Sampler
from spd_hydra.section import ConfigError


@torch.no_grad()
def evaluate(
    objective: Objective,
    sampler: Sampler,
    *,
    step: int,
    progress: float,
    batches: int,
    reference_positions: int,
    known: KnownAnswer | None,
    certified: bool,
    ideal_l0: dict[str, float],
    ablations: AblationSettings | None = None,
    also: Collection[str] = (),
) -> Evaluation:
    """Measure a decomposition on held-out data; several ranks measure their rows and add up.

    Loss terms are those of training with the same parameters, whether trained on or not, accumulated
    over all batches before they are finalised.

    Args:
        objective: the loss and the model.
        sampler: held-out batches, with columns for every term.
        step: training step, for the record.
        progress: fraction of training done, for scheduled parameters.
        batches: how many batches.
        reference_positions: positions of a global training batch, padding with them.
        known: the known answer, or None.
        certified: whether the target is fit to be decomposed; an uncertified one is never solved.
        ideal_l0: expected L0 of a perfect decomposition, by site, where known.
        ablations: what to measure of ablated models; None: nothing.
        also: loss terms to measure that are measured only where they are trained on.
    """
    model, terms = objective.model, objective.losses.measured_terms(also)
    ablated = None if ablations is None else Ablations(objective, ablations)
    with model.uncompiled():  # batches of another size would be compiled once more
        activity, totals, with_padding = _sums(
            objective, sampler, terms, objective.scheduled(progress, terms), batches, ablated
        )
    if not activity.positions:
        raise ConfigError("data: every position to evaluate on is padding; there is nothing to measure")
    real = reference_positions * activity.positions / with_padding  # as in a training batch padded as much
    losses = _losses(objective, terms, totals, real)
    verdict = None if known is None else _verdict(objective, known)
    recovery = None if verdict is None else verdict.recovery
    contributions = neuron_contributions(model)
    metrics = _metrics(losses, activity, verdict) | agreement_metrics(contributions)
    if ablations is not None and ablated is not None:
        metrics |= ablated.metrics() | _by_group(ablations.groups, activity)
    found = Evaluation(
        step=step,
        n_positions=activity.positions,
        ci_threshold=activity.threshold,
        metrics=metrics | {f"l0_ideal/{site}": value for site, value in ideal_l0.items()},
        sites={site: _site(model, site, activity, verdict, known) for site in model.site_names},
        checks=verdict.checks if verdict else [],
        contributions=contributions,
        mmcs=recovery.mmcs if recovery else None,
        ml2r=recovery.ml2r if recovery else None,
        ml2r_plain=recovery.ml2r_plain if recovery else None,
        solved=certified and verdict.holds(TOLERANCE) if verdict and verdict.checks else None,
        strict=certified and verdict.holds(STRICT_TOLERANCE) if verdict and verdict.checks else None,
    )
    return with_extra(found, model)


def _verdict(objective: Objective, known: KnownAnswer) -> Verdict:
    """The comparison with the known answer, in the precision of training."""
    model = objective.model
    with model.uncompiled():
        return compare(model, known, objective.inputs(known.probe.to(model.device)).ci)


def _losses(
    objective: Objective, terms: Mapping[str, Loss], totals: Mapping[str, Statistics], positions: float
) -> dict[str, float]:
    """Every term, and `total`, the weighted sum of those that are trained on."""
    losses = {name: float(term.value(totals[name], positions)) for name, term in terms.items()}
    active = objective.losses.active_terms()
    total = sum(float(term.weight(totals[name])) * losses[name] for name, term in active.items())
    return {"total": total} | losses


def _sums(
    objective: Objective,
    sampler: Sampler,
    terms: Mapping[str, Loss],
    schedule: ScheduledValues,
    batches: int,
    ablated: Ablations | None,
) -> tuple[Activity, dict[str, Statistics], float]:
    """Over all batches and ranks: activity, statistics of the terms, and positions with padding."""
    activity = Activity(objective.ci_threshold)
    totals: dict[str, Statistics] = {}
    positions = 0
    for number in range(batches):
        batch, draws = sampler(number)
        inputs = objective.inputs(batch)
        positions += next(iter(inputs.ci.values())).lower[..., 0].numel()
        activity.add({site: ci.lower for site, ci in inputs.ci.items()}, inputs.valid)
        for name, found in objective.statistics(inputs, terms, draws, schedule).items():
            before = totals.get(name)
            totals[name] = found if before is None else {key: before[key] + found[key] for key in found}
        if ablated is not None:
            ablated.add(inputs, partial(sampler.numbers, number), sampler.answers(number))
    (all_positions,) = distributed.exact_sum([torch.tensor(float(positions), dtype=torch.float64)])
    return activity.over_ranks(), over_ranks(totals), float(all_positions)


def _metrics(losses: dict[str, float], activity: Activity, verdict: Verdict | None) -> dict[str, float]:
    metrics = {f"loss/{name}": value for name, value in losses.items()}
    l0 = activity.l0()
    metrics |= {f"l0/{site}": value for site, value in l0.items()} | {"l0/total": sum(l0.values())}
    metrics |= {f"alive/{site}": float(value) for site, value in activity.alive().items()}
    if verdict is not None:
        metrics |= {
            f"recovery/{check.name}_error_{check.tolerance:g}/{check.site}": float(check.error)
            for check in verdict.checks
        }
        if verdict.recovery is not None:
            metrics |= {f"recovery/{name}": value for name, value in verdict.recovery._asdict().items()}
        if len(verdict.per_site) > 1:
            for site, own in verdict.per_site.items():
                metrics |= {f"recovery/mmcs/{site}": own.mmcs, f"recovery/ml2r/{site}": own.ml2r}
    return metrics


def _by_group(groups: Mapping[str, Sequence[str]], activity: Activity) -> dict[str, float]:
    """L0 and alive subcomponents of each group of sites."""
    l0, alive = activity.l0(), activity.alive()
    return {f"l0_group/{name}": sum(l0[site] for site in sites) for name, sites in groups.items()} | {
        f"alive_group/{name}": float(sum(alive[site] for site in sites)) for name, sites in groups.items()
    }


def _site(
    model: DecomposedModel, site: str, activity: Activity, verdict: Verdict | None, known: KnownAnswer | None
) -> SiteEvaluation:
    counts = activity.sites[site]
    pieces = model.pieces(site)
    mean_ci = _numpy(counts.sum_ci) / activity.positions
    probe = verdict.probes[site] if verdict else None
    order = verdict.order.get(site) if verdict else None
    directions = known.directions.get(site) if known else None
    return SiteEvaluation(
        weight=_numpy(model.weight(site)),
        V=_numpy(pieces.V),
        U=_numpy(pieces.U),
        mean_ci=mean_ci,
        density=_numpy(counts.active) / activity.positions,
        histogram=_numpy(counts.histogram).astype(np.int64),
        order=np.argsort(-mean_ci, kind="stable") if order is None else order,
        probe_lower=probe.lower if probe else None,
        probe_upper=probe.upper if probe else None,
        directions=None if directions is None else _numpy(directions),
    )


def _numpy(tensor: Tensor) -> np.ndarray:
    array: np.ndarray = tensor.detach().float().cpu().numpy()
    return array
