"""Terms that press for few subcomponents: one parameter moves during training, and so may the pressure."""

import dataclasses
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from spd_hydra.loss.base import Loss, LossInputs, Statistics, mean
from spd_hydra.schedule import annealed
from spd_hydra.section import Problem, option


@dataclasses.dataclass(kw_only=True)
class SparsityLoss(Loss):
    """A term of which one parameter moves linearly between two fractions of training.

    Between two others its coefficient is `squeeze` times as large: what costs more than it is worth is
    merged, and what is missed comes back after. At first it may rise from 0, so that what is needed is known
    before there is pressure to do without. The term itself, as it is logged, is without these factors.
    """

    anneal_from: float = option(0.0, "fraction of training at which the parameter begins to move", ge=0, le=1)
    anneal_to: float = option(1.0, "fraction of training at which it reaches its end", ge=0, le=1)
    warmup: float = option(
        0.0, "fraction of training over which the coefficient rises linearly from 0; 0: none", ge=0, le=1
    )
    squeeze: float = option(
        1.0, "factor on the coefficient from squeeze_from on, until squeeze_to; 1: none", gt=0
    )
    squeeze_from: float = option(0.7, "fraction of training at which the factor begins", ge=0, le=1)
    squeeze_to: float = option(0.8, "fraction of training at which it ends", ge=0, le=1)

    def problems(self) -> Iterator[Problem]:
        """Adds: nothing can end before it begins."""
        yield from super().problems()
        for what in ("anneal", "squeeze"):
            begin, end = getattr(self, f"{what}_from"), getattr(self, f"{what}_to")
            if begin > end:
                yield Problem(f"{what}_from", f"got {begin}, must be ≤ {what}_to, which is {end}")

    def annealed(self, progress: float, start: float, end: float) -> float:
        """The parameter at `progress` in [0, 1] of training."""
        return annealed(progress, start, end, self.anneal_from, self.anneal_to)

    def scheduled(self, progress: float) -> dict[str, float]:
        if not self._moves:
            return {}
        squeeze = self.squeeze if self.squeeze_from <= progress < self.squeeze_to else 1.0
        return {"pressure": squeeze * (min(1.0, progress / self.warmup) if self.warmup else 1.0)}

    @property
    def _moves(self) -> bool:
        """Whether the coefficient is not always the same."""
        return self.squeeze != 1 or self.warmup > 0

    def counts(self, inputs: LossInputs) -> Statistics:
        """The number of positions, which statistics need beside the sums; the factor too, if it moves."""
        count = inputs.n_positions
        if not self._moves:
            return {"count": count}
        return {"count": count, "pressure": inputs.schedule["pressure"] * count}

    def weight(self, statistics: Statistics) -> Float[Tensor, ""] | float:
        if not self._moves:
            return self.coeff
        return self.coeff * mean(statistics["pressure"], statistics["count"])

    @staticmethod
    def means(statistics: Statistics) -> Float[Tensor, " subcomponents"]:
        """Of what is summed over positions for each subcomponent of all sites, the means."""
        sums = [total for key, total in statistics.items() if key.startswith("sum/")]
        return mean(torch.cat(sums), statistics["count"])
