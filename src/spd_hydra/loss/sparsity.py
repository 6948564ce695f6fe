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

    Its coefficient may rise from 0, so that what is needed is known before there is pressure to do without.
    The term itself, as it is logged, is without that factor.
    """

    anneal_from: float = option(0.0, "fraction of training at which the parameter begins to move", ge=0, le=1)
    anneal_to: float = option(1.0, "fraction of training at which it reaches its end", ge=0, le=1)
    warmup: float = option(
        0.0, "fraction of training over which the coefficient rises linearly from 0; 0: none", ge=0, le=1
    )

    def problems(self) -> Iterator[Problem]:
        """Adds: nothing can end before it begins."""
        yield from super().problems()
        if self.anneal_from > self.anneal_to:
            wrong = f"got {self.anneal_from}, must be ≤ anneal_to, which is {self.anneal_to}"
            yield Problem("anneal_from", wrong)

    def annealed(self, progress: float, start: float, end: float) -> float:
        """The parameter at `progress` in [0, 1] of training."""
        return annealed(progress, start, end, self.anneal_from, self.anneal_to)

    def scheduled(self, progress: float) -> dict[str, float]:
        return {"warmup": min(1.0, progress / self.warmup)} if self.warmup else {}

    def counts(self, inputs: LossInputs) -> Statistics:
        """The number of positions, which statistics need beside the sums; with a warmup, its factor too."""
        count = inputs.n_positions
        if not self.warmup:
            return {"count": count}
        return {"count": count, "warmup": inputs.schedule["warmup"] * count}

    def weight(self, statistics: Statistics) -> Float[Tensor, ""] | float:
        if not self.warmup:
            return self.coeff
        return self.coeff * mean(statistics["warmup"], statistics["count"])

    @staticmethod
    def means(statistics: Statistics) -> Float[Tensor, " subcomponents"]:
        """Of what is summed over positions for each subcomponent of all sites, the means."""
        sums = [total for key, total in statistics.items() if key.startswith("sum/")]
        return mean(torch.cat(sums), statistics["count"])
