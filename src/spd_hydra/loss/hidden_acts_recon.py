"""Reconstruction of hidden activations: with masks on, each site's output has to stay the target's."""

import dataclasses

import torch
from torch import Tensor

from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import MaskSource
from spd_hydra.factored import Activation, dense
from spd_hydra.loss.base import Loss, LossInputs, Statistics
from spd_hydra.loss.divergence import Divergence, divergence_sum
from spd_hydra.loss.recon import mask_columns, mask_maker
from spd_hydra.section import option


@dataclasses.dataclass(kw_only=True)
class HiddenActsRecon(Loss):
    """Mean over sites of the mean squared error of their outputs, with stochastic masks at all sites at once.

    (1/S) Σ_l mean over positions and the d_out outputs of (y_l - y*_l)², where y_l is the output of site l in
    the masked pass, which has the errors of the sites before it, and y*_l the target's own. A site counts the
    same whatever its width. Mean over `n_samples` draws too. Range: ≥ 0. Later practice; its code compares
    the inputs of sites.
    """

    always_measured = False  # a masked pass and a wide vector for each site

    n_samples: int = option(1, "independent draws of masks per batch", ge=1)

    def columns(self, model: DecomposedModel) -> int:
        return self.n_samples * mask_columns(MaskSource.stochastic, model)

    def passes(self, model: DecomposedModel) -> int:
        return self.n_samples

    @property
    def is_mean(self) -> bool:
        return True

    def statistics(self, inputs: LossInputs) -> Statistics:
        errors: list[Tensor] = []
        counts: list[Tensor | int] = []
        for draws in inputs.draws.chunk(self.n_samples, dim=-1):
            outputs: dict[str, Activation] = {}
            make = mask_maker(MaskSource.stochastic, inputs.model, draws)
            drawn = {site: make(site, ci) for site, ci in inputs.ci.items()}
            inputs.model(inputs.batch, drawn, reuse=inputs.reuse, outputs=outputs, recompute=inputs.recompute)
            for site, y in outputs.items():
                own = dense(inputs.clean.outputs[site])
                error, elements = divergence_sum(Divergence.mse, dense(y), own, inputs.valid)
                errors.append(error / own.shape[-1])
                counts.append(elements // own.shape[-1])
        total = torch.stack(errors).sum()
        return {"sum": total, "count": total.new_zeros(()) + sum(counts)}
