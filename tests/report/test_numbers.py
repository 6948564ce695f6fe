"""Numbers as people read them."""

import pytest

from spd_hydra.report.numbers import wilson_interval


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        (0, 10, 0.0, 0.277533),  # z²/(n + z²) = 3.841459/13.841459
        (10, 10, 0.722467, 1.0),
        (5, 10, 0.236593, 0.763407),  # 0.5 ± z √(0.025 + z²/400)/(1 + z²/10) = 0.5 ± 0.263407
        (18, 20, 0.698966, 0.972134),
        (1, 1, 0.206549, 1.0),
    ],
)
def test_wilson_intervals_are_those_computed_by_hand(
    successes: int, trials: int, low: float, high: float
) -> None:
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=2e-6)


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_fractions_are_refused(successes: int, trials: int) -> None:
    with pytest.raises(ValueError, match="must be 0 ≤ successes ≤ trials"):
        wilson_interval(successes, trials)
