"""The metrics log: its newest row is found without reading all, torn lines are passed over."""

import json
from pathlib import Path

import pytest

from spd_hydra.metrics_log import append_row, last_row


def test_there_is_no_last_row_where_there_is_no_log(tmp_path: Path) -> None:
    assert last_row(tmp_path / "metrics.jsonl") is None


@pytest.mark.parametrize("length", [1, 2**16, 3 * 2**16, 2**20])
def test_the_last_row_is_found_however_long_it_is(tmp_path: Path, length: int) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        append_row(path, {"step": step, "text": "x" * length})
    found = last_row(path)
    assert found is not None
    assert (found["step"], len(found["text"])) == (2, length)


def test_a_line_that_was_torn_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_row(path, {"step": 7})
    with path.open("a") as file:
        file.write(json.dumps({"step": 8, "text": "x" * 2**17})[:-1])
    assert last_row(path) == {"step": 7}
