"""The numbers of a run that the tables of a sweep show: their order, their headings, how they are written."""

from collections.abc import Sequence
from typing import Any

from spd_hydra.report.ablations import percent
from spd_hydra.report.numbers import mean_and_spread, number

ABLATED = {"ce_recovered": "CE recovered", "ce": "CE", "kl": "KL", "mse": "MSE"}
"""What is left with causal importances as masks, where that was measured."""
QUANTITIES = {
    "mmcs": "MMCS",
    "ml2r": "ML2R",
    **ABLATED,
    "alive": "alive",
    "l0": "L0",
    "loss": "loss",
    "seconds": "seconds",
    "steps_per_second": "steps/s",
}
_SHARES = {"ce_recovered"}


def written(quantity: str, value: Any) -> str:
    """One value: a share in per cent, all else as a number, – for none."""
    return percent(value) if quantity in _SHARES else number(value)


def spread(quantity: str, values: Sequence[float]) -> str:
    """Mean ± standard deviation of several: a share in per cent, all else as numbers, – for none."""
    if quantity not in _SHARES or not values:
        return mean_and_spread(values)
    return f"{mean_and_spread([100 * value for value in values])} %"
