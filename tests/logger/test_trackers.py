"""Trackers are ended last, side by side, and nobody waits for them for longer than they may take."""

import threading
import time
from typing import Any

import pytest

from spd_hydra.logger.base import Logger
from spd_hydra.logger.trackers import Trackers


class Slow(Logger):
    """One whose end takes so many seconds."""

    def __init__(self, seconds: float, limit: float = 60.0, meeting: threading.Barrier | None = None) -> None:
        self._seconds, self._meeting = seconds, meeting
        self.finish_seconds = limit
        self.ended: list[tuple[dict[str, Any] | None, int]] = []

    def finish(self, summary: dict[str, Any] | None, exit_code: int) -> None:
        if self._meeting is not None:
            self._meeting.wait(timeout=30)
        time.sleep(self._seconds)
        self.ended.append((summary, exit_code))


def begun(*trackers: Logger) -> Trackers:
    found = Trackers()
    for tracker in trackers:
        found.begun(tracker)
    return found


def test_what_came_to_its_end_is_told_with_its_summary_and_the_rest_as_failed() -> None:
    one, other = Slow(0), Slow(0)
    trackers = begun(one, other)
    trackers.succeeded(one, {"solved": True})
    trackers.finish()
    trackers.finish()
    assert (one.ended, other.ended) == ([({"solved": True}, 0)], [(None, 1)])


def test_they_are_ended_side_by_side() -> None:
    """Each waits until all three are being ended."""
    meeting = threading.Barrier(3)
    slow = [Slow(0, meeting=meeting) for _ in range(3)]
    begun(*slow).finish()
    assert [len(own.ended) for own in slow] == [1, 1, 1]


def test_one_that_hangs_is_left_behind_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    hanging, other = Slow(30, limit=0.2), Slow(0, limit=0.2)
    started = time.monotonic()
    begun(hanging, other).finish()
    assert time.monotonic() - started < 10
    assert not hanging.ended
    assert other.ended
    assert "1 of 2 trackers did not end in time and are left behind" in caplog.text


def test_one_that_fails_keeps_the_others_from_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Logger):
        def finish(self, summary: dict[str, Any] | None, exit_code: int) -> None:
            raise OSError("no network")

    other = Slow(0)
    begun(Failing(), other).finish()
    assert other.ended == [(None, 1)]
    assert "a tracker could not be ended: OSError: no network" in caplog.text
