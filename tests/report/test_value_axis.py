"""Ticks at the values of a sweep."""

import pytest

from spd_hydra.report.value_axis import is_logarithmic, tick_texts


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [([1, 4], True), ([1, 3.9], False), ([0, 4], False), ([-4, 4], False), ([], False), ([2], False)],
)
def test_values_far_apart_are_on_a_logarithmic_axis(values: list[float], logarithmic: bool) -> None:
    assert is_logarithmic(values) is logarithmic


def test_texts_that_have_room_stand_upright() -> None:
    assert tick_texts([0.25, 0.5, 1, 2, 4], 2.5) == (["0.25", "0.5", "1", "2", "4"], False)
    assert tick_texts([3], 2.5) == (["3"], False)
    assert tick_texts([], 2.5) == ([], False)


def test_crowded_texts_slant() -> None:
    values = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3]
    assert tick_texts(values, 2.5) == (["1e-05", "3e-05", "0.0001", "0.0003", "0.001", "0.003"], True)
    assert tick_texts(values, 8.0)[1] is False


def test_of_values_too_near_each_other_only_some_have_a_text() -> None:
    texts, slanting = tick_texts([1.0, 1.01, 1.02, 1.2, 2.0], 2.5)
    assert (texts, slanting) == (["1", "", "", "1.2", "2"], True)
