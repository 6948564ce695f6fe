"""Metrics of plug-ins are beside our own, and one that fails costs nothing but itself."""

from types import ModuleType

import pytest
from tests.figure.synthetic import tms

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.metric import extra
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.metric.extra import metric, with_extra


@pytest.fixture(autouse=True)
def none_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extra, "_measures", {})


def count(model: DecomposedModel, evaluation: Evaluation) -> dict[str, float]:
    return {"sites": len(evaluation.sites), "of_model": len(model.site_names)}


def fails(model: DecomposedModel, evaluation: Evaluation) -> dict[str, float]:
    raise ZeroDivisionError


def test_metrics_of_plug_ins_are_among_those_of_an_evaluation(language: ModuleType) -> None:
    metric("count")(count)
    before = tms()
    found = with_extra(before, language.hand_made()).metrics
    assert found == before.metrics | {"count/sites": float(len(before.sites)), "count/of_model": 2.0}
    assert with_extra(before, language.hand_made()).extra == {"count/sites": 2.0, "count/of_model": 2.0}


def test_one_that_fails_or_has_a_taken_name_is_left_out_with_a_warning(
    language: ModuleType, caplog: pytest.LogCaptureFixture
) -> None:
    for group, measure in {"mine": fails, "loss": count, "count": count}.items():
        metric(group)(measure)
    before = tms()
    found = with_extra(before, language.hand_made()).metrics
    assert found.keys() - before.metrics.keys() == {"count/sites", "count/of_model"}
    assert [record.message.split(" could")[0] for record in caplog.records] == ["metric mine", "metric loss"]


def test_a_group_belongs_to_one_module() -> None:
    metric("count")(count)
    metric("count")(count)  # imported twice

    def other(model: DecomposedModel, evaluation: Evaluation) -> dict[str, float]:
        return {}

    other.__module__ = "somewhere.else"
    with pytest.raises(ValueError, match=f"metric count is already measured by {count.__module__}"):
        metric("count")(other)
