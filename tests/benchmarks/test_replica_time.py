"""The benchmark of replicas: it steps what it says, and its table is arithmetic."""

import pytest
import torch
from benchmarks.replica_time import rows, section, stepper, time_case
from benchmarks.step_cases import Case

SMALL = ["train.batch_size=8", "train.compile=false"]


def test_a_step_is_one_of_all_replicas() -> None:
    losses = stepper(Case("tms_5-2"), 3, SMALL, "cpu")()
    totals = [loss.total.item() for loss in losses]
    assert len(set(totals)) == 3
    alone = stepper(Case("tms_5-2"), 1, [*SMALL, "seed=0"], "cpu")()
    assert totals[0] == pytest.approx(alone.total.item(), rel=1e-5)


def test_ratios_are_over_the_smallest_count(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"tms_5-2": {1: 2.0, 16: 5.0}}
    assert rows(times) == [
        ["tms_5-2", "1", "2.00", "1.00", "2.000"],
        ["tms_5-2", "16", "5.00", "2.50", "0.312"],
    ]
    environment = {"cpu": "a processor", "cpu_count": 2, "threads": 1, "torch": "2", "python": "3"}
    text = section(times, environment, "the command")
    assert text.startswith("## Replicas")
    assert "| tms_5-2 | 16 | 5.00 | 2.50 | 0.312 |" in text


def test_every_count_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.replica_time._ROUND_SECONDS", 0.01)
    found = time_case(Case("tms_5-2"), [1, 2], SMALL, torch.device("cpu"))
    assert list(found) == [1, 2]
    assert all(ms > 0 for ms in found.values())
