"""What is said of a decomposition without a known answer, from numbers made by hand."""

import dataclasses
from typing import Any

import pytest
from tests.metric.test_diagnosis import SETTINGS, STEADY

from spd_hydra.metric.diagnosis import diagnose
from spd_hydra.metric.evaluation import Evaluation

GOOD = {
    "kl/unmasked": 0.001, "kl/ci": 0.4, "kl/random": 1.7, "kl/zero": 9.0,
    "alive/mlp": 30.0, "alive/attn": 0.0,
}  # fmt: skip


def evaluation(**changes: float) -> Evaluation:
    metrics = GOOD | {name.replace("__", "/"): value for name, value in changes.items()}
    return Evaluation(step=6000, n_positions=100, ci_threshold=0.1, metrics=metrics, sites={})


def said(found: Evaluation, **changes: Any) -> list[str]:
    settings = dataclasses.replace(SETTINGS, **changes)
    return [f"{one.symptom}; {one.advice}" for one in diagnose(found, STEADY, settings)]


def test_nothing_is_said_of_a_good_one() -> None:
    assert said(evaluation()) == []


def test_a_sum_that_is_not_the_target_asks_for_more_steps_before_anything_else() -> None:
    assert said(evaluation(kl__unmasked=3.0, kl__ci=8.0, kl__random=2.0)) == [
        "the subcomponents do not sum to the weights yet: with all of them on the KL from the target is 3, "
        "with all off 9; try train.steps=24000 (now 6000)"
    ]


def test_importances_no_better_than_random_ask_for_more_steps() -> None:
    assert said(evaluation(kl__ci=1.7)) == [
        "masks by causal importance lose as much as random ones: KL 1.7 and 1.7; "
        "try train.steps=24000 (now 6000)"
    ]
    assert said(evaluation(kl__ci=0.942, kl__random=0.0926))[0].startswith(
        "masks by causal importance lose 10 times as much as random ones: KL 0.942 and 0.0926; "
    )
    assert said(evaluation(kl__ci=1.0, kl__random=0.0))[0].startswith(
        "masks by causal importance lose more than random ones: KL 1 and 0; "
    )
    assert said(evaluation(kl__ci=0.4, kl__random=0.3)) == []  # next to nothing is lost by either


def test_where_nothing_is_needed_the_coefficient_is_too_high() -> None:
    found = evaluation(alive__mlp=0.0, kl__ci=9.0)
    assert said(found) == [
        "no subcomponent is needed anywhere; the coefficient is too high: "
        "try loss.importance_minimality.coeff=0.0003 (now 0.003)"
    ]
    assert "coeff" not in said(found, sparsity_coeff=0.0)[0]


@pytest.mark.parametrize("zero", [0.0, None])
def test_a_target_that_its_sites_do_nothing_for_and_one_not_measured_say_nothing(zero: float | None) -> None:
    metrics = {name: value for name, value in GOOD.items() if name != "kl/zero"}
    metrics |= {} if zero is None else {"kl/zero": zero}
    assert said(dataclasses.replace(evaluation(), metrics=metrics)) == []


def test_the_squared_error_of_a_model_of_ones_own_is_read_likewise() -> None:
    metrics = {name.replace("kl/", "mse/"): value for name, value in GOOD.items()} | {"mse/unmasked": 1.0}
    (line,) = said(dataclasses.replace(evaluation(), metrics=metrics))
    assert "with all of them on the squared error from the target is 1, with all off 9" in line
