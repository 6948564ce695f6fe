"""Whole numbers may be written as people write them."""

import pytest

from spd_hydra.composer import Composer
from spd_hydra.composition import compose
from spd_hydra.overrides import with_entries
from spd_hydra.plan import make_plan
from spd_hydra.section import ConfigError


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("train.steps=1e3", "train.steps=1000"),
        ("train.steps=1.5e3,2E+3", "train.steps=1500,2000"),
        ("eval.pgd_steps=[1e1,20.0]", "eval.pgd_steps=[10,20]"),
        ("train.lr=1e-3", "train.lr=1e-3"),
        ("seed=1.5", "seed=1.5"),
        ("name=007", "name=007"),
        ("data.name=1e3.jsonl", "data.name=1e3.jsonl"),
        ("hydra.sweep.dir=1e3", "hydra.sweep.dir=1e3"),
        ("name='1e3'", "name='1e3'"),
        ("seed=1e300", "seed=1e300"),
    ],
)
def test_whole_floats_are_digits_and_all_else_stays(typed: str, read: str) -> None:
    assert with_entries([typed]) == [read]


def test_a_whole_float_fits_whole_numbers_and_numbers_alike() -> None:
    config = compose(["train.steps=1e3", "train.lr=1e0", "eval.pgd_steps=[1e1]"])
    assert (config.train.steps, config.train.lr, config.eval.pgd_steps) == (1000, 1.0, [10])
    assert type(config.train.lr) is float


def test_a_sweep_over_whole_floats_is_one_over_whole_numbers() -> None:
    with Composer.open() as composer:
        plan = make_plan(composer, ["train.steps=1e3,2e3", "eval.every=1e2"], multirun=True)
    assert [job.config.train.steps for job in plan.jobs] == [1000, 2000]


def test_a_number_that_is_not_whole_is_refused_as_before() -> None:
    with pytest.raises(ConfigError, match=r"train.steps: got 1.5, must be a whole number"):
        compose(["train.steps=1.5"])
