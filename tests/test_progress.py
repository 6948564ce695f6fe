"""Progress shows enough, seldom enough, and asks the device for numbers only then."""

import io
import logging
from collections.abc import Mapping

import pytest

from spd_hydra.progress import Progress, format_duration, format_number


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Numbers:
    calls = 0

    def __call__(self) -> Mapping[str, float]:
        self.calls += 1
        return {"loss": 0.00123456, "L0": 0.25}


def run(progress: Progress, clock: Clock, numbers: Numbers, steps: range, seconds: float) -> None:
    with progress:
        for step in steps:
            clock.now += seconds
            progress.update(step, numbers)


def test_away_from_a_terminal_there_is_a_line_per_half_minute(caplog: pytest.LogCaptureFixture) -> None:
    clock, numbers, stream = Clock(), Numbers(), io.StringIO()
    with caplog.at_level(logging.INFO):
        run(Progress(1000, stream=stream, clock=clock), clock, numbers, range(1, 1001), seconds=0.125)
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "step 241/1000  loss 0.001235  L0 0.25  8 it/s  ETA 1m35s",
        "step 481/1000  loss 0.001235  L0 0.25  8 it/s  ETA 1m05s",
        "step 721/1000  loss 0.001235  L0 0.25  8 it/s  ETA 35s",
        "step 961/1000  loss 0.001235  L0 0.25  8 it/s  ETA 5s",
        "step 1000/1000  loss 0.001235  L0 0.25  8 it/s  ETA 0s",
    ]
    assert numbers.calls == 5
    assert stream.getvalue() == ""


def test_after_a_resume_the_rate_counts_only_new_steps(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    progress = Progress(600, start=500, stream=io.StringIO(), clock=clock)
    with caplog.at_level(logging.INFO):
        run(progress, clock, Numbers(), range(501, 517), seconds=2.0)
    assert [record.getMessage() for record in caplog.records] == [
        "step 516/600  loss 0.001235  L0 0.25  0.5 it/s  ETA 2m48s"
    ]


def test_time_before_the_first_step_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    progress = Progress(100, stream=io.StringIO(), clock=clock)
    clock.now += 1000.0
    with caplog.at_level(logging.INFO):
        run(progress, clock, Numbers(), range(1, 30), seconds=1.0)
    assert caplog.records == []


def test_the_first_step_which_may_be_compiled_counts_for_no_forecast(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO), Progress(1000, stream=io.StringIO(), clock=clock) as progress:
        clock.now += 100.0
        progress.update(1, Numbers())
        clock.now += 30.0
        progress.update(31, Numbers())
    assert [record.getMessage() for record in caplog.records] == [
        "step 31/1000  loss 0.001235  L0 0.25  1 it/s  ETA 16m09s"
    ]


def test_the_word_before_the_steps_can_be_chosen(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO):
        progress = Progress(2, what="initialisations, step", stream=io.StringIO(), clock=clock)
        run(progress, clock, Numbers(), range(1, 3), seconds=1.0)
    assert caplog.records[0].getMessage().startswith("initialisations, step 2/2  loss")


def test_on_a_terminal_there_is_a_bar_and_numbers_are_asked_once_a_second(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock, numbers, stream = Clock(), Numbers(), Terminal()
    with caplog.at_level(logging.INFO):
        run(Progress(1000, stream=stream, clock=clock), clock, numbers, range(1, 1001), seconds=0.0078125)
    assert numbers.calls == 8  # 7.8 s, and the end
    assert all(text in stream.getvalue() for text in ("1000/1000", "loss=0.001235", "L0=0.25", "it/s"))
    assert caplog.records == []


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_disabled_it_shows_and_asks_nothing(stream: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    clock, numbers = Clock(), Numbers()
    with caplog.at_level(logging.INFO):
        run(Progress(10, disable=True, stream=stream, clock=clock), clock, numbers, range(1, 11), 60.0)
    assert (numbers.calls, stream.getvalue(), caplog.records) == (0, "", [])


def test_the_bar_is_closed_when_training_fails() -> None:
    def fail() -> Mapping[str, float]:
        raise RuntimeError("boom")

    stream = Terminal()
    with pytest.raises(RuntimeError, match="boom"), Progress(1, stream=stream, clock=Clock()) as progress:
        progress.update(1, fail)
    assert stream.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.4, "59s"), (59.6, "1m00s"), (185, "3m05s"), (3600, "1h00m"), (7 * 3600 + 61, "7h01m")],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.25, "0.25"), (1234567.0, "1.235e+06"), (3e-9, "3e-09"), (float("nan"), "nan")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert format_number(value) == text
