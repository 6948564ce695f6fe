"""A loss term that is 0, until it makes its process fail or has slowed it down."""

import dataclasses
import os
import signal
import sys
import time

import torch

from spd_hydra import distributed
from spd_hydra.loss.base import Loss, LossInputs, Statistics
from spd_hydra.section import option, register

_calls = 0


@register("loss_term", "trouble")
@dataclasses.dataclass(kw_only=True)
class Trouble(Loss):
    """0."""

    how: str = option("none", "none | raise | exit | os_exit | kill | nan")
    at: int = option(8, "the call at which it happens", ge=1)
    rank: int = option(0, "the rank to which it happens", ge=0)
    seconds: float = option(0.0, "how long every call takes", ge=0)
    slow_at: int = option(
        0, "the call from which a job that was never requeued takes 2 seconds; 0: none", ge=0
    )

    def statistics(self, inputs: LossInputs) -> Statistics:
        global _calls
        _calls += 1
        is_first_start = "SLURM_RESTART_COUNT" not in os.environ
        time.sleep(2 if is_first_start and 0 < self.slow_at <= _calls else self.seconds)
        value = next(iter(inputs.ci.values())).lower.sum() * 0
        if _calls == self.at and distributed.rank() == self.rank:
            if self.how == "raise":
                raise RuntimeError("trouble was asked for")
            if self.how == "exit":
                sys.exit(7)
            if self.how == "os_exit":
                os._exit(9)
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "nan":
                value = value + float("nan")
        return {"sum": value, "count": torch.ones_like(value)}
