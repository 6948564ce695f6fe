"""Neuron contributions: how each neuron of a residual MLP serves each feature."""

import torch
from torch import nn

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.metric.evaluation import NeuronContributions


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
