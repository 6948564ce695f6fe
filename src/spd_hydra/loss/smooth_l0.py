"""Smooth L0: the number of subcomponents in use, counted softly."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor

from spd_hydra.loss.base import LossInputs, Statistics
from spd_hydra.loss.importance_minimality import sum_over_positions
from spd_hydra.loss.sparsity import SparsityLoss
from spd_hydra.section import option


@dataclasses.dataclass(kw_only=True)
class SmoothL0(SparsityLoss):
    """Σ_l Σ_c f_c (1 + κ·log2(1 + a·f_c)), f_c = mean over positions of ψ(g_upper), ψ(g) = g² / (g² + γ²).

    For γ → 0 ψ counts what is above 0, so that Σ f is L0. γ falls during training, as p does in
    `importance_minimality`, for which this term can stand: its slope is bounded by 0.65 / γ, where that of
    g^p, p < 1, is not bounded near 0 and can make a decomposition collapse late.

    κ is `frequency_coeff`, a is `frequency_scale`. Where `importance_minimality` has the number of positions
    of a batch, a is a number of its own: the value does not depend on the size of the batch. Summed over
    sites and subcomponents, not divided by the number of sites. Range: ≥ 0. Later practice.
    """

    always_measured = False  # an alternative, with numbers that mean little beside those of the other

    gamma_start: float = option(1.0, "γ at the beginning: the importance that counts half", gt=0)
    gamma_end: float = option(0.01, "γ at the end", gt=0)
    frequency_coeff: float = option(0.0, "κ, weight of the frequency term f·log2(1 + a·f)", ge=0)
    frequency_scale: float = option(1.0, "a: subcomponents rarer than 1 / a are hardly charged by it", gt=0)

    def scheduled(self, progress: float) -> dict[str, float]:
        return super().scheduled(progress) | {"gamma": self.gamma(progress)}

    def gamma(self, progress: float) -> float:
        """γ at `progress` in [0, 1] of training: linear between the two fractions."""
        return self.annealed(progress, self.gamma_start, self.gamma_end)

    @property
    def is_mean(self) -> bool:
        return self.frequency_coeff == 0

    def statistics(self, inputs: LossInputs) -> Statistics:
        squared = inputs.schedule["gamma"] ** 2
        sums = {}
        for site, ci in inputs.ci.items():
            g = ci.upper.float()
            sums[f"sum/{site}"] = sum_over_positions(g**2 / (g**2 + squared), inputs.valid)
        return sums | self.counts(inputs)

    def value(self, statistics: Statistics, reference_positions: Tensor | float) -> Float[Tensor, ""]:
        f = self.means(statistics)
        return (f * (1 + self.frequency_coeff * torch.log2(1 + self.frequency_scale * f))).sum()
