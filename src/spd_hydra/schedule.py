"""Numbers that move during training: learning rates of targets and decompositions, parameters of losses."""

import dataclasses
import math
from enum import Enum

from spd_hydra.section import Section, option


class ScheduleKind(Enum):
    """Shape of the decay from 1 to the final fraction."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    cosine_quarter = "cosine_quarter"


@dataclasses.dataclass(kw_only=True)
class Schedule(Section):
    """How a learning rate moves over training: a linear warmup, then a decay that ends on the last step."""

    kind: ScheduleKind = option(
        ScheduleKind.constant,
        "constant | linear | cosine (half wave) | cosine_quarter (the paper's cos(pi t / 2))",
    )
    warmup_fraction: float = option(
        0.0, "share of the steps spent rising linearly to the full rate", ge=0, lt=1
    )
    final_fraction: float = option(
        0.0, "rate at the last step over the full rate; unused by constant", ge=0, le=1
    )

    def factor(self, step: int, steps: int) -> float:
        """The factor on the learning rate at one step.

        With w = floor(warmup_fraction * steps) and t = (step - w) / (steps - 1 - w), f the final
        fraction: (step + 1) / w in the warmup, then f + (1 - f) * s(t), where s is 1 (constant),
        1 - t (linear), (1 + cos(pi t)) / 2 (cosine) or cos(pi t / 2) (cosine_quarter).

        Args:
            step: 0 … steps - 1; later steps keep the last value.
            steps: length of training, at least 1.
        """
        warmup = int(self.warmup_fraction * steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.kind is ScheduleKind.constant:
            return 1.0
        last = steps - 1 - warmup
        t = min((step - warmup) / last, 1.0) if last > 0 else 0.0
        if self.kind is ScheduleKind.linear:
            shape = 1 - t
        elif self.kind is ScheduleKind.cosine:
            shape = (1 + math.cos(math.pi * t)) / 2
        else:
            shape = math.cos(math.pi * t / 2)
        return self.final_fraction + (1 - self.final_fraction) * shape


def annealed(progress: float, start: float, end: float, begins: float, ends: float) -> float:
    """A parameter at `progress` in [0, 1] of training: linear between two fractions of it."""
    span = ends - begins
    done = float(progress >= ends) if span == 0 else (progress - begins) / span
    return start + (end - start) * min(max(done, 0.0), 1.0)
