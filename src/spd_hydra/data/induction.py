"""Sequences with a repeated token: the inputs of the induction-head model."""

import dataclasses

from jaxtyping import Int32, Int64
from torch import Tensor

from spd_hydra.data.base import Batches, DataSource
from spd_hydra.model.base import TargetSpec
from spd_hydra.model.induction import InductionHeads
from spd_hydra.section import ConfigError, kind_of, register


@dataclasses.dataclass(frozen=True, kw_only=True)
class InductionBatches(Batches):
    """The stream of sequences for one induction-head model."""

    target: InductionHeads
    traceable = True

    def __call__(
        self, key: Int32[Tensor, "2"], rows: Int32[Tensor, " batch"]
    ) -> Int64[Tensor, "batch length"]:
        """Random tokens in which the induction token stands once, and again at the end."""
        return self.target.sequences(key, rows)


@register("data", "induction")
@dataclasses.dataclass(kw_only=True)
class Induction(DataSource):
    """Random sequences … s m … s; how long and of which tokens, the model says."""

    def bind(self, target: TargetSpec) -> InductionBatches:
        """The stream for this model.

        Raises:
            ConfigError: it is another kind of target.
        """
        if not isinstance(target, InductionHeads):
            name = kind_of(type(target)) or type(target).__name__
            raise ConfigError(
                f"data: induction cannot feed {name}; choose model=induction_heads, or the data source made "
                "for this model"
            )
        return InductionBatches(target=target)
