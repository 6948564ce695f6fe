"""What a data source must offer: batches that are a pure function of a key and the rows asked for."""

import dataclasses
from collections.abc import Sequence

from jaxtyping import Int32
from torch import Tensor

from spd_hydra.model.base import TargetSpec
from spd_hydra.section import Section


class Batches:
    """The stream of one data source, cut to fit one target.

    A stream that loads in worker processes starts them inside `stop.kept_from_children()`.

    Attributes:
        traceable: calling it is pure tensor arithmetic, so that it may run inside a compiled step.
        ordered: rows number the places of one endless stream, in which nothing comes twice before all came
            once; else a batch is a draw of its own, and its rows count from 0.
        padded: batches hold token ids, negative ones at positions that are padding.
    """

    traceable = False
    ordered = False
    padded = False

    def __call__(self, key: Int32[Tensor, "2"], rows: Int32[Tensor, " batch"]) -> Tensor:
        """The given rows of the batch that belongs to the key; the same arguments give the same batch.

        Args:
            key: of the purpose and step; of an ordered stream, of the purpose alone.
            rows: indices in the global batch, or in the ordered stream.
        """
        raise NotImplementedError

    def answers(self, key: Int32[Tensor, "2"], rows: Tensor) -> Tensor | None:
        """What mask tokens of a batch stand for, negative at all other positions; None: it has none."""
        return None

    def content(self) -> str | None:
        """Digest of the rows, where they are known before they are asked for; None: they are not."""
        return None

    def decode(self, ids: Sequence[int]) -> list[str] | None:
        """The text of each token by itself; None: ids are shown as they are."""
        return None

    def notes(self) -> list[str]:
        """What one has to know of what was measured on the batches so far, a sentence each."""
        return []


@dataclasses.dataclass(kw_only=True)
class DataSource(Section):
    """Where the inputs of the target come from."""

    def bind(self, target: TargetSpec) -> Batches:
        """The stream of batches for this target.

        Raises:
            ConfigError: this data source cannot feed that kind of target.
        """
        raise NotImplementedError

    def bind_eval(self, target: TargetSpec) -> Batches:
        """The stream of held-out batches.

        Where batches are drawn from a distribution it is that of training: other keys give other draws.
        """
        return self.bind(target)

    def commits(self) -> dict[str, str]:
        """What is read from a hub now, as a commit for each field `revision` or `<what>_revision`."""
        return {}

    def names(self) -> dict[str, str]:
        """What is read, by field, with local paths whole, so that it means the same from any directory."""
        return {}

    def notes(self) -> list[str]:
        """What one has to know of a run on these data, a sentence each."""
        return []

    def prefetch(self, target: TargetSpec) -> list[str]:
        """Fetch and prepare all that batches need, and say in a line for each thing where it lies."""
        return []
