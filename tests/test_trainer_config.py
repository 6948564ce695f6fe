"""Defaults and ranges of training and evaluation."""

import re
from typing import Any

import pytest

from spd_hydra.precision import Precision
from spd_hydra.schedule import ScheduleKind
from spd_hydra.section import ConfigError
from spd_hydra.trainer_config import Evaluation, FaithfulnessWarmup, Sharding, Training


def test_the_warmup_of_the_toys_is_the_default() -> None:
    warmup = FaithfulnessWarmup()
    assert (warmup.steps, warmup.lr, warmup.weight_decay) == (200, 1e-2, 0.1)


def test_training_defaults_are_those_of_tms() -> None:
    training = Training()
    assert (training.steps, training.batch_size, training.lr) == (10_000, 4096, 1e-3)
    assert training.lr_schedule.kind is ScheduleKind.cosine
    assert training.precision is Precision.fp32
    assert training.shard is Sharding.none
    assert training.clip_components is None
    assert training.clip_ci_fn is None


def test_toys_count_a_subcomponent_as_active_above_a_tenth() -> None:
    assert Evaluation().ci_threshold == 0.1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("steps", 0),
        ("batch_size", 0),
        ("lr", 0),
        ("clip_components", 0),
        ("clip_ci_fn", -1),
        ("log_every", 0),
    ],
)
def test_training_values_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: got {value}, must be"):
        Training(**{field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("every", 0),
        ("figures_every", -1),
        ("ci_threshold", 1.0),
        ("rounded", [0.0, 1.0]),
        ("pgd_steps", [20, 0]),
        ("pgd_step_size", 0),
    ],
)
def test_evaluation_values_out_of_range_are_refused(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: got {re.escape(str(value))}, must be"):
        Evaluation(**{field: value})
