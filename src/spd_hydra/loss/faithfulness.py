"""Faithfulness: the subcomponents have to sum to the target's weights."""

import dataclasses

import torch
from torch import Tensor

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.loss.base import Loss, LossInputs, Statistics


@dataclasses.dataclass(kw_only=True)
class Faithfulness(Loss):
    """Mean squared entry of the weight deltas: Σ_l ‖W_l - (V_l U_l)ᵀ‖²_F / Σ_l numel(W_l).

    The sums run over the decomposed matrices alone (the paper divides by all of the target's
    parameters, its code as here). Range: ≥ 0. Paper, §2.1.
    """

    @property
    def is_mean(self) -> bool:
        return True  # every part has the value of the whole

    def statistics(self, inputs: LossInputs) -> Statistics:
        return faithfulness_statistics(inputs.model)


def faithfulness_statistics(model: DecomposedModel) -> Statistics:
    """Sum of squared entries of all weight deltas and the number of entries; depends on no data."""
    with torch.autocast(model.device.type, enabled=False):  # small differences of large numbers
        deltas = [model.weight_delta(site) for site in model.site_names]
    total: Tensor = torch.stack([delta.square().sum() for delta in deltas]).sum()
    return {
        "sum": total,
        "count": torch.full((), float(sum(delta.numel() for delta in deltas)), device=total.device),
    }
