"""Pictures of an evaluation. The order of the imports below is their order in the report."""

from spd_hydra.figure import (  # noqa: I001
    ablations,
    trade_off,
    sites,
    tms_polygon,
    causal_importance,
    weights,
    neuron_contributions,
    ci_histogram,
    mean_ci,
    activation_density,
    losses,
    sparsity,
)
from spd_hydra.figure.base import Drawn, FigureKind, draw_all, figure, figures

__all__ = [
    "Drawn",
    "FigureKind",
    "ablations",
    "activation_density",
    "causal_importance",
    "ci_histogram",
    "draw_all",
    "figure",
    "figures",
    "losses",
    "mean_ci",
    "neuron_contributions",
    "sites",
    "sparsity",
    "tms_polygon",
    "trade_off",
    "weights",
]
