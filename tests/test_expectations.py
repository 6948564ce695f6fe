"""What keeps a run from its known answer is told before it starts, and nothing else is."""

import pytest

from spd_hydra.composer import Composer
from spd_hydra.composition import compose
from spd_hydra.expectations import expectations
from spd_hydra.plan import make_plan
from spd_hydra.preflight import preflight


def told(*words: str) -> list[str]:
    return expectations(preflight(compose(list(words))))


def test_too_few_subcomponents_are_told_with_keys_that_are_enough() -> None:
    (line,) = told("model=tms_40-10")
    assert "(20 of 40 at embed, 20 of 40 at unembed)" in line
    assert line.endswith("; try decomposition.sites.embed.C=80 decomposition.sites.unembed.C=80")
    assert told("model=tms_40-10", *line.partition("; try ")[2].split()) == []


@pytest.mark.parametrize(("C", "lines"), [(5, 0), (4, 1)])
def test_as_many_subcomponents_as_the_known_answer_are_enough(C: int, lines: int) -> None:
    assert len(told(f"decomposition.sites.embed.C={C}", f"decomposition.sites.unembed.C={C}")) == lines


@pytest.mark.parametrize(
    ("words", "is_told"),
    [
        (["model=tms_40-10"], True),
        (["model=tms_40-10", "name=mine"], False),
        (["model=tms_5-2"], False),
        (["experiment=tms_40-10"], False),
        (["experiment=tms_40-10", "model=tms_5-2"], True),
        (["model.n_features=6"], False),
    ],
)
def test_a_run_that_has_the_name_of_an_experiment_on_another_model_is_told_so(
    words: list[str], is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with Composer.open() as composer:
        make_plan(composer, words, multirun=False)
    assert [record.message.startswith("name: got tms_") for record in caplog.records] == [True] * is_told


def test_in_a_sweep_it_is_told_once_for_each_name(caplog: pytest.LogCaptureFixture) -> None:
    with Composer.open() as composer:
        make_plan(composer, ["model=tms_40-10", "seed=0,1,2"], multirun=True)
    assert len(caplog.records) == 1
