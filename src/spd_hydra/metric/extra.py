"""Metrics of plug-ins: functions of what an evaluation measured."""

import dataclasses
import logging
from collections.abc import Callable, Mapping

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.metric.evaluation import Evaluation

log = logging.getLogger(__name__)

Measure = Callable[[DecomposedModel, Evaluation], Mapping[str, float]]
"""Numbers by name, e.g. by site; every rank has the same model and evaluation, and gives the same."""

_measures: dict[str, Measure] = {}


def metric(group: str) -> Callable[[Measure], Measure]:
    """Decorator: take `<group>/<name>` into the metrics of every evaluation.

    They are then in `metrics.jsonl` and in `extra` of `summary.json`, for loggers, figures and as
    `objective`. What needs a pass of its own over every batch is a loss term: it is measured without being
    trained on by `eval.also`.

    Args:
        group: of the metrics' names, which no other metric begins with.

    Raises:
        ValueError: another function already has that group.
    """

    def add(measure: Measure) -> Measure:
        known = _measures.get(group)
        if known is not None and known.__module__ != measure.__module__:
            raise ValueError(f"metric {group} is already measured by {known.__module__}")
        _measures[group] = measure
        return measure

    return add


def with_extra(evaluation: Evaluation, model: DecomposedModel) -> Evaluation:
    """The evaluation with the metrics of plug-ins; one that fails is logged and left out, as a figure is."""
    found: dict[str, float] = {}
    taken = {name.partition("/")[0] for name in evaluation.metrics}
    for group, measure in _measures.items():
        try:
            if group in taken:
                raise ValueError(f"there are metrics {group}/… already")
            found |= {f"{group}/{name}": float(value) for name, value in measure(model, evaluation).items()}
        except Exception:
            log.warning("metric %s could not be measured; the run goes on without it", group, exc_info=True)
    return dataclasses.replace(evaluation, metrics=evaluation.metrics | found, extra=found)
