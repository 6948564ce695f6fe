"""How the numbers of a sweep are written."""

import pytest

from spd_hydra.report.quantities import spread, written


@pytest.mark.parametrize(
    ("quantity", "value", "text"),
    [
        ("ce_recovered", 0.9431, "94.3 %"),
        ("ce_recovered", None, "–"),
        ("kl", 0.25, "0.2500"),
        ("mmcs", None, "–"),
    ],
)
def test_shares_are_in_per_cent_and_other_quantities_plain(quantity: str, value: float, text: str) -> None:
    assert written(quantity, value) == text


def test_means_of_shares_are_in_per_cent_too() -> None:
    assert spread("ce_recovered", [0.5, 0.6]) == "55 ± 7.1 %"  # √(2 · 0.05²) = 0.0707
    assert spread("ce_recovered", []) == "–"
    assert spread("l0", [0.5, 0.6]) == "0.55 ± 0.071"
