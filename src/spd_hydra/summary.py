"""summary.json: the result of a run in one place."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from spd_hydra.config import RunConfig
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.metric.finding import Finding
from spd_hydra.metric.known_answer import LARGEST_ML2R_ERROR, LEAST_MMCS, STRICT_TOLERANCE, TOLERANCE


def summarise(
    config: RunConfig,
    evaluation: Evaluation,
    target: Mapping[str, Any],
    *,
    diagnosis: Sequence[Finding],
    cosine_decides: bool,
    seconds: Mapping[str, float],
    steps_per_second: float | None,
    restarts: Mapping[str, Any] | None,
    replicas: int = 1,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The summary of a run: verdict with its checks, diagnosis, sparsity, losses, target, notes, times.

    `extra` holds the metrics of plug-ins by their names in the metrics log.

    `diagnosis` is empty where the known answer was found. `replicas` is the number of runs that shared their
    steps: the times are those of all together. `notes` are added to those about the data.
    """
    return {
        "experiment": config.name,
        "seed": config.seed,
        "steps": evaluation.step,
        "solved": evaluation.solved,
        "strict": evaluation.strict,
        "checks": [
            {
                "name": check.name,
                "site": check.site,
                "tolerance": check.tolerance,
                "error": check.error,
                "expected": check.expected,
            }
            for check in evaluation.checks
        ],
        "diagnosis": [dataclasses.asdict(finding) for finding in diagnosis],
        "thresholds": {
            "tolerance": TOLERANCE,
            "strict_tolerance": STRICT_TOLERANCE,
            "mmcs": LEAST_MMCS,
            "ml2r": LARGEST_ML2R_ERROR,
            "cosine_decides": cosine_decides,
            "ci": evaluation.ci_threshold,
            "positions": evaluation.n_positions,
        },
        **_numbers(evaluation),
        "objective": evaluation.metrics.get(config.objective),
        "target": dict(target),
        "notes": [*config.data.notes(), *notes],
        "seconds": dict(seconds),
        "steps_per_second": steps_per_second,
        "restarts": None if restarts is None else dict(restarts),
        "replicas": replicas,
        **_ablated(evaluation.metrics),
    }


def _numbers(evaluation: Evaluation) -> dict[str, Any]:
    """Single numbers, and those of sites, layers and loss terms."""

    def by_name(group: str) -> dict[str, float]:
        prefix = f"{group}/"
        return {
            name.removeprefix(prefix): v for name, v in evaluation.metrics.items() if name.startswith(prefix)
        }

    return {
        "mmcs": evaluation.mmcs,
        "ml2r": evaluation.ml2r,
        "ml2r_plain": evaluation.ml2r_plain,
        "contributions": {
            layer: {"r2": r2, "slope": evaluation.metrics[f"recovery/neuron_slope/{layer}"]}
            for layer, r2 in by_name("recovery/neuron_r2").items()
        },
        "alive": {site: int(number) for site, number in by_name("alive").items()},
        "l0": by_name("l0"),
        "l0_ideal": by_name("l0_ideal"),
        "losses": by_name("loss"),
        "extra": dict(evaluation.extra),
    }


def _ablated(metrics: Mapping[str, float]) -> dict[str, Any]:
    """CE and divergence by kind of mask, sparsity and losses by group of sites, adversaries by their steps.

    Nothing where no model was ablated.
    """
    found: dict[str, dict[str, dict[str, float]]] = {"ablations": {}, "groups": {}}
    places = {
        **{quantity: ("ablations", quantity) for quantity in ("ce", "kl", "mse", "ce_recovered")},
        **{f"{quantity}_subset": ("groups", quantity) for quantity in ("ce", "kl", "mse")},
        "l0_group": ("groups", "l0"),
        "alive_group": ("groups", "alive"),
    }
    for name, value in metrics.items():
        group, _, rest = name.partition("/")
        if group in places:
            part, quantity = places[group]
            found[part].setdefault(rest, {})[quantity] = int(value) if quantity == "alive" else value
    pgd = {name.removeprefix("pgd/"): value for name, value in metrics.items() if name.startswith("pgd/")}
    return {part: own for part, own in {**found, "pgd": pgd}.items() if own}
