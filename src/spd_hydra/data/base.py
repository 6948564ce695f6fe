"""What a data source must offer: batches that are a pure function of a key and the rows asked for."""

import dataclasses
from typing import Protocol

from jaxtyping import Int32
from torch import Tensor

from spd_hydra.model.base import TargetSpec
from spd_hydra.section import Section


class Batches(Protocol):
    """The stream of one data source, cut to fit one target.

    `traceable`: calling it is pure tensor arithmetic, so that it may run inside a compiled step.
    A stream that loads in worker processes starts them inside `stop.kept_from_children()`.
    """

    traceable: bool

    def __call__(self, key: Int32[Tensor, "2"], rows: Int32[Tensor, " batch"]) -> Tensor:
        """The given rows of the batch that belongs to the key; the same arguments give the same batch."""
        ...


@dataclasses.dataclass(kw_only=True)
class DataSource(Section):
    """Where the inputs of the target come from."""

    def bind(self, target: TargetSpec) -> Batches:
        """The stream of batches for this target.

        Raises:
            ConfigError: this data source cannot feed that kind of target.
        """
        raise NotImplementedError
