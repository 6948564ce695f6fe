"""What ablated models lose, as the terminal and the page say it."""

from pathlib import Path
from typing import Any

import pytest

from spd_hydra.report import verdict_lines, verdict_table, write_report
from spd_hydra.report.ablations import percent


@pytest.fixture
def summary(synthetic: Any, summaries: Any) -> dict[str, Any]:
    """Of a language model of two sites and two groups."""
    found: dict[str, Any] = summaries.summary_of(synthetic.language_model(n_sites=2, C=50), "lm_tiny")
    masks = {
        "target": {"ce": 3.0}, "unmasked": {"ce": 3.06, "kl": 0.05, "ce_recovered": 0.99},
        "ci": {"ce": 3.3, "kl": 0.25, "ce_recovered": 0.95}, "zero": {"ce": 9.0, "kl": 6.0},
    }  # fmt: skip
    return found | {
        "ablations": masks,
        "groups": {
            "attn": {"l0": 12.5, "alive": 40, "ce": 3.1, "kl": 0.1},
            "mlp": {"l0": 30.25, "alive": 90, "ce": 3.2, "kl": 0.2},
        },
        "pgd": {"20": 0.83},
        "alive": {"a": 40, "b": 90},
        "l0": {"a": 12.5, "b": 30.25, "total": 42.75},
        "thresholds": {"ci": 0.0, "positions": 8192},
    }


def test_the_verdict_is_what_masks_of_causal_importances_keep(summary: dict[str, Any]) -> None:
    assert verdict_lines(summary) == [
        "With causal importances as masks 95.0 % of the cross-entropy is recovered: CE 3.3000, target 3, "
        "all off 9; L0 42.75 of 130 alive."
    ]


@pytest.fixture
def roomless(summary: dict[str, Any]) -> dict[str, Any]:
    """The same, of a model whose cross-entropy is better without its sites."""
    masks = {"target": {"ce": 5.956}, "unmasked": {"ce": 5.96, "kl": 0.05}, "ci": {"ce": 5.9729, "kl": 0.25},
             "zero": {"ce": 5.9135, "kl": 0.5}}  # fmt: skip
    return summary | {"ablations": masks}


def test_where_all_off_is_no_worse_no_share_is_told_and_the_divergence_is(roomless: dict[str, Any]) -> None:
    start = "All off (CE 5.9135) is not worse than the target (5.9560), so no share of the cross-entropy is "
    end = (
        "recovered: with causal importances as masks CE is 5.9729 and KL 0.2500 (0.5000 with all off); "
        "L0 42.75 of 130 alive."
    )
    assert verdict_lines(roomless) == [start + end]
    roomless["ablations"]["zero"]["ce"] = 5.9562
    assert verdict_lines(roomless)[0].startswith(
        "All off (CE 5.9562) is hardly worse than the target (5.9560), so no share"
    )


def test_without_a_share_no_table_has_a_column_for_it_and_the_first_card_is_the_divergence(
    roomless: dict[str, Any], synthetic: Any, tmp_path: Path
) -> None:
    table = verdict_table(roomless, colour=False)
    rows = [line.split() for line in table.splitlines()]
    assert ["masks", "CE", "KL"] in rows
    assert ["ci", "5.9729", "0.2500"] in rows
    assert "%" not in table
    write_report(
        tmp_path / "a.html", summary=roomless, evaluation=synthetic.language_model(n_sites=2, C=50),
        history=[], figures=[], config_text="", environment={},
    )  # fmt: skip
    page = (tmp_path / "a.html").read_text()
    cards = page[page.index('class="cards"') :]
    assert "All off (CE 5.9135) is not worse than the target" in page[: page.index("</title>")]
    first, second = "<span>KL</span><b>0.2500</b>", "<span>CE</span><b>5.9729</b>"
    assert cards.index(first) < cards.index(second) < cards.index("<span>Alive</span>")
    assert "CI masks; target 5.9560, all off 5.9135" in cards
    assert "<th>CE</th><th>KL</th>" in page
    assert "<td>5.9729</td><td>0.2500</td>" in page
    assert "CE recovered" not in page
    assert "recovered: 0 %" not in page


def test_without_cross_entropy_the_divergence_is_told(summary: dict[str, Any]) -> None:
    summary["ablations"] = {"ci": {"mse": 0.125}, "zero": {"mse": 2.0}}
    assert verdict_lines(summary) == [
        "With causal importances as masks the MSE is 0.1250 (2 with all off): L0 42.75 of 130 alive."
    ]


def test_the_terminal_shows_masks_groups_thresholds_and_adversaries(summary: dict[str, Any]) -> None:
    table = verdict_table(summary, colour=False)
    assert all(len(line) <= 100 for line in table.splitlines())
    rows = [line.split() for line in table.splitlines()]
    assert ["masks", "CE", "recovered", "KL"] in rows
    assert ["target", "3", "–", "–"] in rows
    assert ["ci", "3.3000", "95.0", "%", "0.2500"] in rows
    assert ["mlp", "90", "30.25", "3.2000", "0.2000"] in rows
    assert "active     g > 0, 8,192 positions" in table
    assert "adversary  KL 0.8300 after 20 steps" in table
    assert "known answer" not in table
    assert "error at" not in table
    assert "target     not checked, seed 1003" not in table  # its measurements certify it
    summary["target"]["measurements"] = []
    assert "target     not checked, seed 1003" in verdict_table(summary, colour=False)
    summary["ablations"] = {}  # as with eval.ablations=false: nobody knows an answer all the same
    table = verdict_table(summary, colour=False)
    assert "target     not checked, seed 1003" in table
    assert ["site", "alive", "L0"] in [line.split() for line in table.splitlines()]


def test_the_page_shows_the_same_numbers(summary: dict[str, Any], synthetic: Any, tmp_path: Path) -> None:
    write_report(
        tmp_path / "a.html", summary=summary, evaluation=synthetic.language_model(n_sites=2, C=50),
        history=[], figures=[], config_text="", environment={},
    )  # fmt: skip
    page = (tmp_path / "a.html").read_text()
    assert page.index('id="ablations"') < page.index("<h2>Sites</h2>")
    for part in (
        "<b>95.0 %</b>",
        "CI masks; unmasked 99.0 %",
        "<td>3.3000</td><td>95.0 %</td><td>0.2500</td>",
        "<code>mlp</code></td><td>90</td><td>30.25</td><td>3.2000</td><td>0.2000</td>",
        "masks above g chosen by an adversary in 20 steps",
    ):
        assert part in page
    assert "Errors count" not in page


@pytest.mark.parametrize(("share", "text"), [(0.9431, "94.3 %"), (-0.02, "-2.0 %"), (None, "–"), (True, "–")])
def test_shares_read_well(share: Any, text: str) -> None:
    assert percent(share) == text
