import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.recovery import ROOT, ROWS, overrides_of, remember, seeds_of, to_do, write_page
from benchmarks.recovery_page import CONTRIBUTIONS, HEADER, page
from benchmarks.recovery_runs import read_runs

from spd_hydra.composition import compose
from spd_hydra.saved_config import to_yaml
from spd_hydra.section import ConfigError

ENVIRONMENT = {
    "cpu": "a processor", "cpu_count": 2, "threads": 1, "device": "cpu", "python": "3.11", "torch": "2.13",
    "platform": "Linux-6", "git": {"commit": "0123456789abcdef", "dirty": False},
}  # fmt: skip


def _summary(
    seed: int, *, solved: bool, mmcs: float, ml2r: float, alive: int, seconds: float
) -> dict[str, Any]:
    checks = [
        {
            "name": "identity",
            "site": "embed",
            "tolerance": tolerance,
            "error": 0 if solved else 3,
            "expected": 5,
        }
        for tolerance in (0.1, 0.2)
    ]
    return {
        "experiment": "tms_5-2", "seed": seed, "steps": 10,
        "solved": solved, "strict": False, "checks": checks,
        "mmcs": mmcs, "ml2r": ml2r, "alive": {"embed": alive}, "l0": {"embed": 0.25, "total": 0.25},
        "losses": {"total": 0.5},
        "target": {"certified": True, "seed": 7, "tries": 1 + seed, "cached": False},
        "seconds": {"target": 2.0, "total": seconds}, "steps_per_second": 100.0,
    }  # fmt: skip


def _leave(directory: Path, status: dict[str, Any], summary: dict[str, Any] | None = None) -> None:
    """What a run leaves behind."""
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text("name: tms_5-2\n")
    (directory / "environment.json").write_text(json.dumps(ENVIRONMENT))
    (directory / "status.json").write_text(json.dumps({"started": "2026-01-02T03:04:05+00:00", **status}))
    if summary is not None:
        (directory / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Five planned runs: one solved, one not, one failed, one killed, one that never began."""
    folder = tmp_path / "tms_5-2"
    first = _summary(0, solved=True, mmcs=0.9992, ml2r=1.01, alive=5, seconds=60.0)
    _leave(folder / "0", {"status": "done"}, first)
    second = _summary(1, solved=False, mmcs=0.95, ml2r=0.8, alive=7, seconds=90.0)
    _leave(folder / "1", {"status": "done"}, second)
    _leave(folder / "2", {"status": "failed", "error": "TrainingError: the loss is nan\nmore"})
    _leave(folder / "3", {"status": "running"})
    (folder / "0.attempt_1").mkdir()
    return tmp_path


def _cells(text: str, start: str) -> list[str]:
    *_, line = [line for line in text.splitlines() if line.startswith(f"| {start} |")]  # the runs come last
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_counts_failures_as_unsolved_and_names_what_has_no_result(out: Path) -> None:
    text = page(read_runs(out, {"tms_5-2": range(5)}), overrides=["threads=1"], commands=["make it"])
    cells = _cells(text, "tms_5-2 | 0–4")
    found = dict(zip(HEADER, cells, strict=True))
    assert found == {
        "experiment": "tms_5-2",
        "seeds": "0–4",
        "solved": "**1 of 3**, 33 % [6, 79], 2 without a result",  # Wilson, by hand
        "authors: solved": "77 of 90, 86 % [77, 91]",
        "strict": "0 of 3, 2 without a result",
        "certified": "2 of 3, 2 without a result",
        "failed": "1",
        "MMCS": "0.9746 ± 0.035 (worst 0.9500)",
        "paper: MMCS": "1.000",
        "ML2R": "0.905 ± 0.15 (worst 0.8000)",
        "paper: ML2R": "0.993 ± 0.002",
        "alive (expected)": "embed 5–7 (5)",
        "target tries": "1.5 (at most 2)",
        "time, median": "75.0 s",
        "steps/s, median": "100",
    }


def test_neuron_contributions_have_a_column_where_a_run_measured_them(out: Path) -> None:
    for seed, r2, slope in ((0, 0.99, 0.9), (1, 0.97, 1.0)):
        folder = out / "resid_mlp1" / str(seed)
        summary = _summary(seed, solved=True, mmcs=0.99, ml2r=1.0, alive=5, seconds=1.0)
        _leave(
            folder, {"status": "done"}, summary | {"contributions": {"layers.0": {"r2": r2, "slope": slope}}}
        )
    text = page(read_runs(out, {"tms_5-2": [0], "resid_mlp1": [0, 1, 2]}), overrides=[], commands=[])
    assert text.partition(CONTRIBUTIONS)[1]
    # 0.98 ± 0.01 √2 and 0.95 ± 0.05 √2
    assert _cells(text, "resid_mlp1 | 0–2")[-1] == "layers.0 R² 0.98 ± 0.014, slope 0.95 ± 0.071"
    assert _cells(text, "resid_mlp1 | 0–2")[3] == "–"  # nothing is published of it
    first, *_ = [line for line in text.splitlines() if line.startswith("| tms_5-2 | 0 |")]
    assert first.endswith("| – |")
    without = page(read_runs(out, {"tms_5-2": [0]}), overrides=[], commands=[])
    assert CONTRIBUTIONS not in without


def test_pictures_are_those_of_the_lowest_solved_seed_and_only_when_asked_for(
    out: Path, tmp_path: Path
) -> None:
    summary = _summary(3, solved=True, mmcs=1.0, ml2r=1.0, alive=5, seconds=1.0)
    _leave(out / "paper" / "tms_5-2" / "3", {"status": "done"}, summary)
    _leave(out / "unsolved" / "0", {"status": "done"}, summary | {"solved": False})
    for folder, figure, content in (
        ("tms_5-2/0", "causal_importance", b"first"),
        ("tms_5-2/0", "losses", b"not shown"),
        ("tms_5-2/1", "causal_importance", b"of a run that is not solved"),
        ("paper/tms_5-2/3", "tms_polygon", b"third"),
        ("unsolved/0", "causal_importance", b"nothing"),
    ):
        (out / folder / "figures").mkdir(exist_ok=True)
        (out / folder / "figures" / f"{figure}.png").write_bytes(content)
    path = tmp_path / "docs" / "page.md"
    write_page(out, path)
    assert "![" not in path.read_text()
    write_page(out, path, with_pictures=True)
    copied = {file.name: file.read_bytes() for file in (path.parent / "images" / "results").iterdir()}
    assert copied == {"tms_5-2_causal_importance.png": b"first", "paper-tms_5-2_tms_polygon.png": b"third"}
    text = path.read_text()
    assert "### tms_5-2\n\nThe causal importance of each subcomponent" in text
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert [(path.parent / link).is_file() for link in links] == [True, True]


def test_without_a_plan_the_page_is_made_of_the_finished_runs(out: Path, tmp_path: Path) -> None:
    write_page(out, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "All 2 runs ended with a result." in text  # the failed and the stopped one left no summary
    assert _cells(text, "tms_5-2 | 0–1")[6] == "0"
    with pytest.raises(ConfigError, match="no finished run: there is nothing to make a table of"):
        write_page(tmp_path / "empty", tmp_path / "page.md")


def test_a_summary_that_lacks_what_is_measured_now_still_has_its_line(out: Path) -> None:
    lean = {"experiment": "tms_5-2", "seed": 5, "solved": True, "strict": True}
    _leave(out / "tms_5-2" / "5", {"status": "done"}, lean)
    text = page(read_runs(out, {"tms_5-2": [5]}), overrides=[], commands=[])
    assert _cells(text, "tms_5-2 | 5")[2:5] == ["solved", "yes", "–"]


def test_every_planned_run_has_a_line_with_its_verdict_or_its_error(out: Path) -> None:
    text = page(read_runs(out, {"tms_5-2": range(5)}), overrides=[], commands=[])
    results = [_cells(text, f"tms_5-2 | {seed}")[2] for seed in range(5)]
    assert results == [
        "solved (attempt 2)", "**not solved**", "**failed**: TrainingError: the loss is nan", "**stopped**",
        "**missing**",
    ]  # fmt: skip
    assert _cells(text, "tms_5-2 | 1")[5:7] == ["3", "3"]
    assert "Of 5 runs 1 failed, 1 missing, 1 stopped." in text


def test_the_page_says_where_it_was_measured_and_what_was_overridden(out: Path) -> None:
    overrides = ["threads=1", "train.steps=9"]
    text = page(read_runs(out, {"tms_5-2": [0]}), overrides=overrides, commands=["make it"])
    assert "**Every run was given `train.steps=9`.**" in text
    assert "- `make it`" in text
    assert "- `spd-run experiment=tms_5-2 seed=<seed> threads=1 train.steps=9`" in text
    assert "a processor, cores: 2" in text
    assert "commit: 0123456789\n" in text
    assert "date: 2026-01-02\n" in text
    assert "do not edit. All 1 runs ended with a result." in text


def test_a_run_with_a_summary_is_not_repeated_and_rows_with_few_seeds_come_first(tmp_path: Path) -> None:
    common = ["threads=1"]
    _leave(tmp_path / "tms_5-2" / "0", {"status": "done"}, {})
    config = compose(overrides_of("tms_5-2", 0, [*common, "out_dir=elsewhere"]))
    (tmp_path / "tms_5-2" / "0" / "config.yaml").write_text(to_yaml(config))
    assert to_do(tmp_path, {"tms_5-2": [0, 1], "tms_40-10": [0]}, common) == [
        ("tms_40-10", 0),
        ("tms_5-2", 1),
    ]


def test_a_result_of_another_configuration_is_refused_with_what_differs(tmp_path: Path) -> None:
    _leave(tmp_path / "tms_5-2" / "0", {"status": "done"}, {})
    config = compose(overrides_of("tms_5-2", 0, ["train.steps=7"]))
    (tmp_path / "tms_5-2" / "0" / "config.yaml").write_text(to_yaml(config))
    with pytest.raises(ConfigError, match=r"another configuration \(train.steps: 7 → 6000\); remove it"):
        to_do(tmp_path, {"tms_5-2": [0]}, [])


def test_the_plan_of_a_folder_grows_and_keeps_one_set_of_overrides(tmp_path: Path) -> None:
    remember(tmp_path, {"tms_5-2-untied": [0]}, ["threads=1"], "first")
    remember(tmp_path, {"tms_5-2": [2, 0], "tms_5-2-untied": [1]}, ["threads=1"], "second")
    plan = json.loads((tmp_path / "recovery.json").read_text())
    assert plan == {
        "overrides": ["threads=1"],
        "seeds": {"tms_5-2": [0, 2], "tms_5-2-untied": [0, 1]},
        "commands": ["first", "second"],
    }
    with pytest.raises(ConfigError, match="take another folder with --out"):
        remember(tmp_path, {"tms_5-2": [3]}, ["threads=2"], "third")


def test_seeds_are_read_as_ranges_and_single_numbers() -> None:
    assert seeds_of("0-2,7") == [0, 1, 2, 7]
    assert {name: len(seeds) for name, seeds in ROWS.items()} == {
        "tms_5-2": 20, "tms_5-2-id": 20, "tms_40-10": 20, "tms_40-10-id": 20, "resid_mlp1": 20,
        "resid_mlp2": 5, "resid_mlp3": 3, "tms_5-2-untied": 20,
    }  # fmt: skip


@pytest.mark.slow
def test_the_command_runs_what_is_missing_puts_a_stopped_run_aside_and_writes_the_page(
    tmp_path: Path,
) -> None:
    (tmp_path / "tms_5-2" / "1").mkdir(parents=True)  # stopped before it had written anything
    words = ["--rows", "tms_5-2", "--seeds", "1", "--out", str(tmp_path), "debug=smoke"]
    command = [sys.executable, "-m", "benchmarks.recovery", *words, f"cache_dir={tmp_path}/cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "1 of 1 runs to do" in done.stdout
    assert "[1 of 1] tms_5-2 seed 1: not solved" in done.stdout
    text = (tmp_path / "results.md").read_text()
    assert _cells(text, "tms_5-2 | 1")[2] == "**not solved** (attempt 2)"
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "0 of 1 runs to do" in again.stdout
