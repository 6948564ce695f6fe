"""Neuron contributions: how each neuron of a residual MLP serves each feature."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.metric.evaluation import NeuronContributions


class Agreement(NamedTuple):
    """How well the decomposition's contributions are the target's: 1 and 1 where they are."""

    r_squared: float
    slope: float


def agreement(layer: NeuronContributions) -> Agreement:
    """R² of the line y = x and slope of the least-squares line, subcomponents (y) over target (x).

    R² = 1 - Σ(y - x)² / Σ(y - mean y)²; slope = Σ(x - mean x)(y - mean y) / Σ(x - mean x)². Over all features
    and neurons of a layer; NaN where one side is constant. Ranges: ≤ 1 and any. Paper, §3.2.
    """
    x, y = layer.target.ravel().astype(float), layer.subcomponents.ravel().astype(float)
    x_spread, y_spread = float(((x - x.mean()) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    if x_spread == 0 or y_spread == 0:
        return Agreement(math.nan, math.nan)
    slope = float(((x - x.mean()) * (y - y.mean())).sum()) / x_spread
    return Agreement(1 - float(((y - x) ** 2).sum()) / y_spread, slope)


def agreement_metrics(layers: Sequence[NeuronContributions]) -> dict[str, float]:
    """`recovery/neuron_r2/<layer>` and `recovery/neuron_slope/<layer>` of every layer."""
    metrics: dict[str, float] = {}
    for layer in layers:
        found = agreement(layer)
        metrics[f"recovery/neuron_r2/{layer.layer}"] = found.r_squared
        metrics[f"recovery/neuron_slope/{layer.layer}"] = found.slope
    return metrics


@torch.no_grad()
def neuron_contributions(model: DecomposedModel) -> list[NeuronContributions]:
    """Contributions of every layer, in the target and in the decomposition; none if it is no ResidMLP.

    Target: `(W_U[:, i] · W_out[:, n]) · (W_in[n] · W_E[i])` for feature i and neuron n. Decomposition:
    the same with `(W_E[i] · V_c) U_c[n]` in place of `W_in[n] · W_E[i]`, for the c at which it is largest
    in magnitude: the target's number, of either sign, if one subcomponent carries the feature alone.
    Paper, §3.2.
    """
    target = model.target
    embed, unembed = getattr(target, "W_E", None), getattr(target, "W_U", None)
    layers = getattr(target, "layers", None)
    if embed is None or unembed is None or not isinstance(layers, nn.ModuleList):
        return []
    found = []
    for index in range(len(layers)):
        site_in, site_out = f"layers.{index}.mlp_in", f"layers.{index}.mlp_out"
        if site_in not in model.site_names:
            continue
        W_out = target.get_submodule(site_out).weight
        reads_out = unembed.T @ W_out  # [features, neurons]
        pieces = model.pieces(site_in)
        reads_in = embed @ model.weight(site_in).T  # [features, neurons]
        per_piece = (embed @ pieces.V)[:, :, None] * pieces.U[None]  # [features, C, neurons]
        # Not the largest value: where all contributions are negative, that would be one of an idle piece.
        strongest = per_piece.gather(1, per_piece.abs().argmax(dim=1, keepdim=True))[:, 0]
        found.append(
            NeuronContributions(
                layer=f"layers.{index}",
                target=(reads_out * reads_in).float().cpu().numpy(),
                subcomponents=(reads_out * strongest).float().cpu().numpy(),
            )
        )
    return found
