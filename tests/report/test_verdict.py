from typing import Any

import pytest

from spd_hydra.report import verdict_lines, verdict_table
from spd_hydra.report.numbers import duration, mean_and_spread, number
from spd_hydra.report.verdict import thresholds_text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.99978, "0.9998"), (1.0000468, "1.0000"), (27.63, "27.63"), (1.3e-5, "1.30e-05"),
        (10_000, "10,000"), (5.0, "5"), (0, "0"), (-0.5, "-0.5000"),
        (1.5e7, "15,000,000"), (123456.7, "1.23e+05"),
        (None, "–"), (True, "–"), (float("nan"), "nan"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_numbers_read_well(value: Any, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(3.21, "3.2 s"), (99.9, "99.9 s"), (245.2, "4 min 05 s"), (7800, "2 h 10 min"), (None, "–")],
)
def test_durations_read_well(seconds: Any, text: str) -> None:
    assert duration(seconds) == text


def test_spread_is_the_sample_standard_deviation() -> None:
    assert mean_and_spread([1.0, 2.0, 3.0, 4.0]) == "2.5 ± 1.3"  # sqrt(5 / 3) = 1.29
    assert mean_and_spread([0.5]) == "0.5000"
    assert mean_and_spread([27.6] * 3) == "27.6 ± 0"  # not the rounding error of the mean
    assert mean_and_spread([]) == "–"


def test_a_solved_run_has_one_line(synthetic: Any, summaries: Any) -> None:
    assert verdict_lines(summaries.summary_of(synthetic.tms())) == [
        "Solved: the known answer was found, also at the strict tolerance 0.1."
    ]


def test_solved_but_not_strictly_is_said(synthetic: Any, summaries: Any) -> None:
    summary = {**summaries.summary_of(synthetic.tms()), "strict": False}
    assert verdict_lines(summary) == [
        "Solved: the known answer was found, but not at the strict tolerance 0.1."
    ]


def test_every_reason_against_is_named(synthetic: Any, summaries: Any) -> None:
    summary = summaries.summary_of(synthetic.tms(solved=False))
    summary["target"]["certified"] = False
    assert verdict_lines(summary) == [
        "Not solved: the decomposition is not the known answer.",
        "The target itself is not certified, so its decomposition proves nothing.",
        "embed: 6 entries are wrong at tolerance 0.2 (identity of 5).",
        "unembed: 6 entries are wrong at tolerance 0.2 (identity of 5).",
        "MMCS 0.9120 is below 0.99: some feature has no subcomponent of its direction.",
        "ML2R 0.8300 is further from 1 than 0.05: subcomponents have the wrong size.",
    ]


def test_what_was_found_and_what_to_change_stands_below_the_reasons(synthetic: Any, summaries: Any) -> None:
    summary = summaries.summary_of(synthetic.tms(solved=False))
    summary["diagnosis"] = [
        {"symptom": "embed: features 1 and 2 share subcomponent 7", "advice": "try a=1", "site": "embed"},
        {"symptom": "L0 still falls", "advice": "try train.steps=" + "9" * 90, "site": None},
    ]
    assert verdict_lines(summary)[-2:] == [
        "embed: features 1 and 2 share subcomponent 7; try a=1",
        "L0 still falls; try train.steps=" + "9" * 90,
    ]
    table = verdict_table(summary, colour=False)
    first = table.index("  → embed: features 1 and 2 share subcomponent 7; try a=1")
    assert (
        table.index("wrong size")
        < first
        < table.index("  → L0 still falls; try")
        < table.index("error at 0.1")
    )


def test_neuron_contributions_are_among_the_facts(synthetic: Any, summaries: Any) -> None:
    summary = summaries.summary_of(synthetic.tms())
    assert "neurons" not in verdict_table(summary, colour=False)
    summary["contributions"] = {
        "layers.0": {"r2": 0.98, "slope": 0.97},
        "layers.1": {"r2": None, "slope": None},
    }
    facts = verdict_table(summary, colour=False)
    assert "  neurons  layers.0: R² 0.9800, slope 0.9700, layers.1: R² –, slope –" in facts


def test_cosines_are_no_reason_where_they_do_not_decide(synthetic: Any, summaries: Any) -> None:
    summary = summaries.summary_of(synthetic.tms(solved=False))
    summary["thresholds"]["cosine_decides"] = False
    assert not any("MMCS" in line or "ML2R" in line for line in verdict_lines(summary))


def test_limits_that_decide_nothing_are_not_shown(synthetic: Any, summaries: Any) -> None:
    summary = summaries.summary_of(synthetic.tms(solved=False))
    assert thresholds_text(summary) == (
        "no error at tolerance 0.2, or 0.1 where it is strict; MMCS ≥ 0.99; ML2R 1 ± 0.05"
    )
    summary["thresholds"]["cosine_decides"] = False
    table = verdict_table(summary, colour=False)
    assert "MMCS    0.9120 (reported only), ML2R 0.8300 (reported only)" in table
    assert "0.99" not in table
    assert thresholds_text(summary).endswith("; MMCS and ML2R are only reported")
    assert thresholds_text({}) == ""


def test_one_step_is_a_step(synthetic: Any, summaries: Any) -> None:
    summary = summaries.summary_of(synthetic.tms()) | {"steps": 1, "pgd": {"1": 0.5, "20": 0.6}}
    summary["restarts"] = {"chosen": 0, "rounds": [{"steps": 1, "losses": [0.5, 0.25]}]}
    table = " ".join(verdict_table(summary, colour=False).split())
    for text in ("seed 3, 1 step ", "losses after 1 step: 0.5000", "after 1 step, ", "after 20 steps"):
        assert text in table


def test_nobody_is_blamed_without_a_known_answer() -> None:
    assert verdict_lines({"solved": None}) == ["No known answer: this target has none to compare with."]


def test_the_table_has_every_number_of_the_summary(synthetic: Any, summaries: Any) -> None:
    table = verdict_table(
        summaries.summary_of(synthetic.tms(solved=False)), "/runs/x/report.html", colour=False
    )
    lines = [line.split() for line in table.splitlines()]
    assert ["embed", "identity", "of", "5", "7", "6", "6", "0.6870"] in lines
    for part in (
        "tms_5-2, seed 3, 10,000 steps", "Not solved", "error at 0.1", "error at 0.2",
        "MMCS    0.9120 (≥ 0.99)",
        "ML2R 0.8300 (1 ± 0.05)", "stochastic_recon 1.30e-05", "certified, seed 1003", "train 18.4 s",
        "543.2 steps/s", "report  /runs/x/report.html",
    ):  # fmt: skip
        assert part in table


def test_the_losses_of_all_initialisations_are_told(synthetic: Any, summaries: Any) -> None:
    summary = summaries.summary_of(synthetic.tms())
    assert "initialisation" not in verdict_table(summary, colour=False)
    rounds = [
        {"steps": 1200, "losses": [0.0016, None, 0.0015]},
        {"steps": 2400, "losses": [0.0014, None, 0.0013]},
    ]
    summary["restarts"] = {"chosen": 2, "rounds": rounds, "steps_of_others": 3600}
    table = " ".join(verdict_table(summary, colour=False).split())
    assert (
        "start initialisation 3 of 3, losses after 1,200 steps: 0.0016, not finite, 0.0015, "
        "losses after 2,400 steps: 0.0014, 0.0013 "
    ) in table


def test_the_table_fits_into_100_columns(synthetic: Any, summaries: Any) -> None:
    summary = summaries.summary_of(synthetic.language_model(n_sites=3))
    summary["losses"] = {f"a_rather_long_name_of_a_loss_{i}": 10.0**-i for i in range(12)}
    summary["alive"]["a." * 100] = 3
    summary["experiment"] = "x" * 300
    assert max(len(line) for line in verdict_table(summary, colour=False).splitlines()) <= 100


def test_colour_codes_appear_only_when_asked_for(
    synthetic: Any, summaries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = summaries.summary_of(synthetic.tms())
    assert "\033" not in verdict_table(summary)  # pytest's stdout is no terminal
    assert "\033[1;32mSolved\033[0m" in verdict_table(summary, colour=True)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033" not in verdict_table(summary)


def test_a_minimal_summary_is_no_error() -> None:
    assert "No known answer" in verdict_table({})
