"""Importance minimality: few subcomponents should be needed per input, and few inputs should need each."""

import dataclasses
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spd_hydra.loss.base import LossInputs, Statistics
from spd_hydra.loss.sparsity import SparsityLoss
from spd_hydra.section import option

_POSITIONS_PER_SUM = 256


@dataclasses.dataclass(kw_only=True)
class ImportanceMinimality(SparsityLoss):
    """Σ_l Σ_c f_c (1 + β·log2(1 + N·f_c)) with f_c = mean over positions of (g_upper + ε)^p.

    Summed over sites and subcomponents, not divided by the number of sites. N is the number of
    positions of a global training batch, also when evaluated on more, so that both compare. β = 0
    is the paper's term (§2.4); β > 0 presses harder on subcomponents that are active often.
    """

    p_start: float = option(1.0, "exponent at the beginning", gt=0)
    p_end: float = option(1.0, "exponent at the end; the same as p_start for none of the annealing", gt=0)
    beta: float = option(0.0, "weight of the frequency factor", ge=0)
    eps: float = option(1e-12, "keeps the slope of g^p finite at 0", gt=0)

    def scheduled(self, progress: float) -> dict[str, float]:
        return super().scheduled(progress) | ({} if self._is_constant else {"p": self.p(progress)})

    def p(self, progress: float) -> float:
        """The exponent at `progress` in [0, 1] of training: linear between the two fractions."""
        return self.annealed(progress, self.p_start, self.p_end)

    @property
    def is_mean(self) -> bool:
        return self.beta == 0

    @property
    def _is_constant(self) -> bool:
        return self.p_start == self.p_end

    def statistics(self, inputs: LossInputs) -> Statistics:
        sums = {
            f"sum/{site}": sum_over_positions(self._power(ci.upper.float(), inputs), inputs.valid)
            for site, ci in inputs.ci.items()
        }
        return sums | self.counts(inputs)

    def _power(self, g: Tensor, inputs: LossInputs) -> Tensor:
        if not self._is_constant:
            return power(g + self.eps, inputs.schedule["p"])
        return g + self.eps if self.p_start == 1 else power(g + self.eps, self.p_start)

    def value(self, statistics: Statistics, reference_positions: Tensor | float) -> Float[Tensor, ""]:
        f = self.means(statistics)
        if self.beta == 0:
            return f.sum()
        return (f * (1 + self.beta * torch.log2(1 + reference_positions * f))).sum()


def power(x: Tensor, p: Tensor | float) -> Tensor:
    """x^p of positive x, with the gradient p·x^p / x, to x alone: one power less than p·x^(p-1)."""
    y: Tensor = _Power.apply(x, p)  # type: ignore[no-untyped-call]
    return y


class _Power(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, p: Tensor | float) -> Tensor:
        return x**p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | float], output: Tensor) -> None:
        x, p = inputs
        ctx.number = None if isinstance(p, Tensor) else p
        ctx.save_for_backward(x, output, *([p] if isinstance(p, Tensor) else []))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, y, *p = ctx.saved_tensors
        return grad * (p[0] if p else ctx.number) * y / x, None


def sum_over_positions(
    x: Float[Tensor, "*positions C"], valid: Bool[Tensor, "*positions"] | None = None
) -> Float[Tensor, " C"]:
    """Sum over positions, padding left out.

    In two levels: a compiled sum adds one term after another, and thousands of float32 terms drift.
    """
    if valid is not None:
        x = x.where(valid[..., None], 0)
    flat = x.flatten(0, -2)
    rows = max(1, min(_POSITIONS_PER_SUM, len(flat)))
    padded = nn.functional.pad(flat, (0, 0, 0, -len(flat) % rows))
    return torch.unflatten(padded, 0, (-1, rows)).sum(1).sum(0)
