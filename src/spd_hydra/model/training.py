"""Training of toy targets from a seed, with certification, retries and a cache."""

import dataclasses

from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra.model.base import TargetSpec
from spd_hydra.schedule import Schedule
from spd_hydra.section import Section, option


@dataclasses.dataclass(kw_only=True)
class TargetTraining(Section):
    """How a toy target is trained: AdamW with default betas."""

    steps: int = option(10_000, "number of optimiser steps", ge=1)
    batch_size: int = option(1024, "inputs per step", ge=1)
    lr: float = option(5e-3, "learning rate of AdamW", gt=0, le=1)
    lr_schedule: Schedule = option(default_factory=Schedule, help="how the learning rate moves")
    weight_decay: float = option(0.01, "decoupled weight decay of AdamW", ge=0, le=1)
    max_tries: int = option(100, "seeds to try until the target is certified", ge=1)


@dataclasses.dataclass(kw_only=True)
class TrainableTarget(TargetSpec):
    """A toy target that is trained in the process, from a seed."""

    training: TargetTraining = option(default_factory=TargetTraining, help="how the target is trained")

    def training_loss(self, module: nn.Module, batch: Tensor) -> Float[Tensor, ""]:
        """The loss of one batch that training minimises."""
        raise NotImplementedError
