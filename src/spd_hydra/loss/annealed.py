"""Terms with a parameter that moves during training."""

import dataclasses
from collections.abc import Iterator

from spd_hydra.loss.base import Loss
from spd_hydra.schedule import annealed
from spd_hydra.section import Problem, option


@dataclasses.dataclass(kw_only=True)
class AnnealedLoss(Loss):
    """A term of which one parameter moves linearly between two fractions of training."""

    anneal_from: float = option(0.0, "fraction of training at which the parameter begins to move", ge=0, le=1)
    anneal_to: float = option(1.0, "fraction of training at which it reaches its end", ge=0, le=1)

    def problems(self) -> Iterator[Problem]:
        """Adds: it cannot end before it begins."""
        yield from super().problems()
        if self.anneal_from > self.anneal_to:
            yield Problem(
                "anneal_from", f"got {self.anneal_from}, must be ≤ anneal_to, which is {self.anneal_to}"
            )

    def annealed(self, progress: float, start: float, end: float) -> float:
        """The parameter at `progress` in [0, 1] of training."""
        return annealed(progress, start, end, self.anneal_from, self.anneal_to)
