"""Schedules against values worked out by hand."""

import math

import pytest

from spd_hydra.schedule import Schedule, ScheduleKind, annealed
from spd_hydra.section import ConfigError


def factors(steps: int = 5, **options: object) -> list[float]:
    schedule = Schedule(**options)
    return [schedule.factor(step, steps) for step in range(steps)]


def test_constant_stays_at_one_whatever_the_final_fraction() -> None:
    assert factors(kind=ScheduleKind.constant, final_fraction=0.1) == [1, 1, 1, 1, 1]


def test_linear_falls_in_equal_steps_to_the_final_fraction() -> None:
    assert factors(kind=ScheduleKind.linear, final_fraction=0.2) == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


def test_cosine_is_a_half_wave_to_the_final_fraction() -> None:
    # (1 + cos) / 2 at 0, 45, 90, 135, 180 degrees, squeezed into [0.1, 1]
    half = math.sqrt(0.5)
    waves = [1, (1 + half) / 2, 0.5, (1 - half) / 2, 0]
    expected = [0.1 + 0.9 * wave for wave in waves]
    assert factors(kind=ScheduleKind.cosine, final_fraction=0.1) == pytest.approx(expected)


def test_cosine_quarter_falls_faster_at_the_end_than_at_the_start() -> None:
    # cos at 0, 22.5, 45, 67.5, 90 degrees
    expected = [1, 0.9238795, 0.7071068, 0.3826834, 0]
    assert factors(kind=ScheduleKind.cosine_quarter) == pytest.approx(expected, abs=1e-7)


def test_warmup_rises_linearly_and_the_decay_starts_after_it() -> None:
    found = factors(steps=8, kind=ScheduleKind.linear, warmup_fraction=0.5)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1, 1, 2 / 3, 1 / 3, 0])


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_a_single_step_is_taken_at_the_full_rate(kind: ScheduleKind) -> None:
    assert Schedule(kind=kind).factor(0, 1) == 1


@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_steps_after_the_end_keep_the_last_value(kind: ScheduleKind) -> None:
    schedule = Schedule(kind=kind, final_fraction=0.3)
    assert schedule.factor(25, 10) == schedule.factor(9, 10)


@pytest.mark.parametrize(
    ("key", "value"), [("warmup_fraction", 1.0), ("final_fraction", 1.5), ("final_fraction", -1)]
)
def test_fractions_outside_their_range_are_named(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: got {value}, must be"):
        Schedule(**{key: value})


def test_a_parameter_is_annealed_between_two_fractions_of_training() -> None:
    found = [annealed(progress, 2.0, 1.0, 0.25, 0.75) for progress in (0.0, 0.25, 0.375, 0.5, 0.75, 1.0)]
    assert found == pytest.approx([2, 2, 1.75, 1.5, 1, 1])
    assert [annealed(progress, 2.0, 1.0, 0.5, 0.5) for progress in (0.49, 0.5)] == [2, 1]
