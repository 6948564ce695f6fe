import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.time_to_solved import (
    TITLE,
    first_solved_step,
    read_all,
    seconds_until,
    section,
    time_run,
)

SUMMARY: dict[str, Any] = {
    "solved": True, "steps": 3000,
    "thresholds": {"tolerance": 0.2, "mmcs": 0.99, "ml2r": 0.05, "cosine_decides": True},
    "target": {"certified": True},
    "seconds": {"target": 4.0, "compile": 2.0, "train": 30.0, "eval": 3.0, "total": 41.0},
    "restarts": None,
}  # fmt: skip
ENVIRONMENT = {"cpu": "a processor", "cpu_count": 2, "threads": 1, "torch": "2.13", "python": "3.11"}


def _row(step: int, embed: int, hidden: int, mmcs: float = 1.0, ml2r: float = 1.0) -> dict[str, Any]:
    return {
        "step": step, "split": "eval", "recovery/mmcs": mmcs, "recovery/ml2r": ml2r,
        "recovery/identity_error_0.2/embed": float(embed), "recovery/identity_error_0.1/embed": 9.0,
        "recovery/dense_error_0.2/hidden.0": float(hidden),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "step"),
    [
        ([_row(1000, 1, 0), _row(2000, 0, 0), _row(3000, 0, 0)], 2000),
        ([_row(1000, 0, 2), _row(2000, 0, 0, mmcs=0.98), _row(3000, 0, 0, ml2r=0.96)], 3000),
        ([_row(1000, 0, 0, ml2r=1.06), _row(2000, 0, 0, ml2r=0.94), _row(3000, 3, 0)], None),
        ([{"step": 1000, "split": "train", "loss/total": 1.0}], None),
    ],
)
def test_the_first_evaluation_counts_in_which_all_errors_and_cosines_are_good(
    rows: list[dict[str, Any]], step: int | None
) -> None:
    assert first_solved_step(rows, SUMMARY) == step


def test_cosines_count_only_where_they_decide_and_nothing_is_solved_without_a_certified_target() -> None:
    rows = [_row(1000, 0, 0, mmcs=0.2)]
    thresholds = {**SUMMARY["thresholds"], "cosine_decides": False}
    assert first_solved_step(rows, {**SUMMARY, "thresholds": thresholds}) == 1000
    summary = {**SUMMARY, "thresholds": thresholds, "target": {"certified": False}}
    assert first_solved_step(rows, summary) is None


def test_what_came_after_an_evaluation_is_taken_off_the_time_of_the_process() -> None:
    assert seconds_until(3000, 50.0, SUMMARY) == 50.0
    assert seconds_until(1000, 50.0, SUMMARY) == pytest.approx(50 - 33 * 2 / 3)
    # Four initialisations of 500 steps: 1500 steps besides the 3000, of which 2500 are done at step 1000.
    restarts = {"rounds": [], "chosen": 0, "steps_of_others": 1500}
    assert seconds_until(1000, 50.0, {**SUMMARY, "restarts": restarts}) == pytest.approx(
        50 - 33 * 2000 / 4500
    )


def _leave(
    out: Path,
    seed: int,
    wall: float,
    summary: dict[str, Any],
    rows: list[dict[str, Any]],
    experiment: str = "tms_5-2-id",
) -> None:
    folder = out / experiment / "warm" / str(seed)
    run = folder / experiment / "2026-01-02_03-04-05_abcdef"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(f"name: {experiment}\n")
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"experiment": experiment, "seed": seed, "compiler": "warm", "seconds": wall,
            "overrides": [f"experiment={experiment}", f"seed={seed}"]}  # fmt: skip
    (folder / "wall.json").write_text(json.dumps(told))


def test_the_table_has_medians_over_finished_runs_and_says_how_many_never_got_there(tmp_path: Path) -> None:
    _leave(tmp_path, 0, 50.0, SUMMARY, [_row(1000, 1, 0), _row(2000, 0, 0)])
    _leave(tmp_path, 1, 60.0, SUMMARY, [_row(1000, 1, 0), _row(3000, 0, 0)])
    _leave(tmp_path, 2, 55.0, {**SUMMARY, "solved": False}, [_row(3000, 1, 0)])
    (tmp_path / "tms_5-2-id" / "warm" / "3").mkdir()  # stopped before it ended
    text = section(read_all(tmp_path), "the command")
    assert text.startswith(f"## {TITLE}\n")
    assert "measured with `the command`" in text
    assert "a processor, 2 cores, 1 thread(s)" in text
    line = next(line for line in text.splitlines() if line.startswith("| tms_5-2-id |"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "tms_5-2-id", "warm", "0, 1, 2", "2 of 3", "55.0 s (50.0 s to 60.0 s)",
        "49.5 s (39.0 s to 60.0 s), 1 never", "2,500 (2,000 to 3,000)", "4.0 s (4.0 s to 4.0 s)",
        "2.0 s (2.0 s to 2.0 s)", "30.0 s (30.0 s to 30.0 s)", "3.0 s (3.0 s to 3.0 s)",
    ]  # fmt: skip


def test_experiments_in_a_folder_of_their_own_are_read_too(tmp_path: Path) -> None:
    _leave(tmp_path, 0, 50.0, SUMMARY, [_row(2000, 0, 0)], experiment="paper/tms_5-2")
    assert [(run.experiment, run.wall) for run in read_all(tmp_path)] == [("paper/tms_5-2", 50.0)]


def test_a_finished_run_is_not_repeated_and_one_with_other_overrides_is_refused(tmp_path: Path) -> None:
    _leave(tmp_path, 4, 50.0, SUMMARY, [_row(2000, 0, 0)])
    assert time_run(tmp_path, "tms_5-2-id", 4, "warm", []).wall == 50.0
    with pytest.raises(RuntimeError, match=r"seed=4 train\.steps=9; take another"):
        time_run(tmp_path, "tms_5-2-id", 4, "warm", ["train.steps=9"])


@pytest.mark.slow
def test_a_run_of_spd_run_is_timed_as_a_whole(tmp_path: Path) -> None:
    run = time_run(tmp_path, "tms_5-2", 1, "cold", ["debug=smoke"])
    assert run.wall > run.summary["seconds"]["total"] > 0
    assert (run.first_step, run.after) == (None, None)  # nothing is found in 20 steps
    assert read_all(tmp_path) == [run]
