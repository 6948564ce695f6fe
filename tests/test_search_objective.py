"""Searches whose best value says nothing are told so."""

import pytest
from hydra.core.config_store import ConfigStore

from spd_hydra.composer import Composer
from spd_hydra.plan import make_plan
from spd_hydra.search_objective import degenerate

COEFF = "loss.importance_minimality.coeff"
SEARCH = ["hydra/sweeper=chooses", f"{COEFF}=interval(1e-4, 1e-2)", "train.steps=2"]


@pytest.fixture(autouse=True, scope="module")
def sweeper() -> None:
    ConfigStore.instance().store(group="hydra/sweeper", name="chooses", node={"_target_": "a.b.Chooses"})


@pytest.mark.parametrize(
    ("objective", "key", "is_told"),
    [
        ("loss/total", COEFF, True),
        ("loss/total", "loss.extra.mine.coeff", True),
        ("loss/total", "train.lr", False),
        ("l0/total", COEFF, True),
        ("alive/embed", "loss.smooth_l0.coeff", True),
        ("l0/total", "loss.stochastic_recon.coeff", False),
        ("recovery/mmcs", COEFF, False),
        ("loss/faithfulness", COEFF, False),
    ],
)
def test_an_objective_that_contains_what_is_searched_is_told(objective: str, key: str, is_told: bool) -> None:
    text = degenerate(objective, ["seed", key])
    assert (text is not None) == is_told
    assert text is None or (text.startswith(f"objective: {objective}, ") and key in text)


def test_only_what_the_sweeper_chooses_is_searched() -> None:
    with Composer.open() as composer:
        assert composer.searched([*SEARCH, "seed=3"]) == [COEFF]
        assert composer.searched([f"{COEFF}=1e-4,1e-3"]) == []


@pytest.mark.parametrize(("objective", "told"), [("loss/total", 1), ("recovery/mmcs", 0)])
def test_the_plan_of_a_degenerate_search_warns_once(
    objective: str, told: int, caplog: pytest.LogCaptureFixture
) -> None:
    with Composer.open() as composer:
        make_plan(composer, [*SEARCH, f"objective={objective}"], multirun=True)
    assert [COEFF in record.message for record in caplog.records] == [True] * told
