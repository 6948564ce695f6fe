import dataclasses
import json
from pathlib import Path

import pytest
from benchmarks.coefficient_range import Cell, factors_of, page, presets, read_cells, section
from benchmarks.recovery_runs import Run

from spd_hydra.report.sweep import SweepRow

NUMBERS = {"l0": 0.6, "l0.a": 0.3, "l0_ideal.a": 0.25, "mmcs": 0.5, "ml2r": 0.75}


def run(seed: int, *, solved: bool = True, state: str = "done") -> Run:
    row = SweepRow(job=seed, state=state, solved=solved, numbers=NUMBERS, overrides={"seed": str(seed)})
    return Run("tms_5-2", seed, row, {}, {}, "", 0)


def test_factors_are_sorted_numbers_above_nothing() -> None:
    assert factors_of("2,0.25,2") == [0.25, 2.0]
    with pytest.raises(ValueError, match="must be > 0"):
        factors_of("0,1")


def test_presets_have_their_own_coefficients() -> None:
    assert presets(["tms_5-2", "tms_40-10"]) == {"tms_5-2": 6e-3, "tms_40-10": 2e-4}


def test_the_table_has_a_line_for_each_factor_and_counts_what_is_missing() -> None:
    cell = Cell(experiment="tms_5-2", factor=0.5, coeff=1.5e-3, runs=[run(0), run(1, solved=False)])
    waiting = dataclasses.replace(cell, factor=1.0, runs=[run(0, state="running")])
    lines = section([cell, waiting]).splitlines()
    assert lines[2] == (
        "| tms_5-2 | 0.5 | 0.0015 | 1 of 2, 50 % [9, 91] | 0.3 ± 0 (0.25) | 0.5 ± 0 | 0.75 ± 0 |"
    )
    assert lines[3] == "| tms_5-2 | 1 | 0.0015 | –, 1 without a result | – | – | – |"


def test_plans_in_the_folder_are_found_again(tmp_path: Path) -> None:
    for factor in ("2", "0.5"):
        folder = tmp_path / f"factor_{factor}" / "tms_5-2"
        folder.mkdir(parents=True)
        plan = {"overrides": [f"loss.importance_minimality.coeff={factor}e-3"], "seeds": {"tms_5-2": [0, 1]}}
        (folder / "recovery.json").write_text(json.dumps(plan))
    found = [(cell.experiment, cell.factor, cell.coeff, len(cell.runs)) for cell in read_cells(tmp_path)]
    assert found == [("tms_5-2", 0.5, 0.5e-3, 2), ("tms_5-2", 2.0, 2e-3, 2)]


def test_the_page_says_where_the_picture_lies_and_how_to_get_it_again() -> None:
    cells = [
        Cell(experiment=name, factor=factor, coeff=1e-3, runs=[run(0), run(2)])
        for name in ("tms_5-2", "tms_40-10")
        for factor in (0.5, 2.0)
    ]
    lines = page(cells, "images/range.png").splitlines()
    assert any(line.endswith("(images/range.png)") for line in lines)
    command = (
        "python -m benchmarks.coefficient_range --experiments tms_5-2,tms_40-10 --factors 0.5,2 --seeds 0,2"
    )
    assert f"- `{command}`" in lines
    assert sum(line.startswith("| tms_") for line in lines) == 4
