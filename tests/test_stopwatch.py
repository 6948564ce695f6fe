"""What a run has spent its time on."""

import contextlib

import pytest

from spd_hydra.stopwatch import Stopwatch


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which a test may change."""
    now = [1000.0]
    monkeypatch.setattr("spd_hydra.stopwatch.time.perf_counter", lambda: now[0])
    return now


def test_seconds_are_counted_by_what_they_were_spent_on_also_where_it_failed(clock: list[float]) -> None:
    watch = Stopwatch()
    with watch.counting("train"):
        clock[0] += 2
    with contextlib.suppress(ZeroDivisionError), watch.counting("eval"):
        clock[0] += 3
        raise ZeroDivisionError
    clock[0] += 5
    assert watch.state()["seconds"] == {"compile": 0, "train": 2, "eval": 3, "total": 10}


def test_what_earlier_sessions_took_is_added(clock: list[float]) -> None:
    watch = Stopwatch()
    watch.steps = 4
    clock[0] += 1
    watch.add({"seconds": {"train": 10.0, "target": 20.0, "total": 100.0}, "timed_steps": 3})
    seconds = {"compile": 0, "train": 10, "eval": 0, "target": 20, "total": 101}
    assert watch.state() == {"seconds": seconds, "timed_steps": 7}
    watch.add({})  # of a run that did not say
    assert watch.state() == {"seconds": seconds, "timed_steps": 7}
