"""What changes the parameters of a decomposition: AdamW, clipping, and its state shared out over ranks."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from spd_hydra import distributed
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.subcomponents import Init
from spd_hydra.loss.faithfulness import faithfulness_statistics
from spd_hydra.optimizer import adamw, in_same_memory, load_state_tensors, state_tensors
from spd_hydra.trainer_config import Sharding, Training

if TYPE_CHECKING:
    from spd_hydra.shards import Shards

logger = logging.getLogger(__name__)


class Updates:
    """The optimiser of a decomposition, over V and U and over the causal-importance function.

    Args:
        model: its trainable parameters are what is changed.
        training: rate, clipping, warmup, and whether ranks share the optimiser's state out.
    """

    def __init__(self, model: DecomposedModel, training: Training) -> None:
        self.model, self.training = model, training
        self.components: list[nn.Parameter] = list(model.component_parameters())
        self.ci_fn: list[nn.Parameter] = list(model.ci_parameters())
        self.groups = [*model.component_groups().items(), (1.0, self.ci_fn)]  # factor on the rate, parameters
        self.shards = _shards(training.shard, self.components + self.ci_fn)
        # What this rank's optimiser changes, and takes gradients of: the parameters, or its pieces of them.
        self.updated = {"components": self._own(self.components), "ci_fn": self._own(self.ci_fn)}
        self.optimizer = adamw(
            [self._own(group) for _, group in self.groups],
            lr=training.lr,
            weight_decay=0.0,
            factors=[factor for factor, _ in self.groups],
        )

    def step(self) -> None:
        """Clip the gradients and take a step along them; all ranks then have the same parameters."""
        _clip(self.updated["components"], self.training.clip_components)
        _clip(self.updated["ci_fn"], self.training.clip_ci_fn)
        self.optimizer.step()
        self._gather(self.components + self.ci_fn)

    def norms(self) -> dict[str, Tensor]:
        """Norms of the gradients, before any clipping."""
        norms: dict[str, Tensor] = {}
        for name, part in self.updated.items():
            norm = nn.utils.get_total_norm([p.grad for p in part if p.grad is not None])
            norms[name] = norm if self.shards is None else self.shards.whole(norm)
        return norms

    def fit_weights(self) -> None:
        """Faithfulness warmup: V and U alone learn to sum to the weights; its optimiser is then dropped.

        Those that start as detectors do so already, with what was chosen for them to read, and stay.
        """
        warmup, model = self.training.faithfulness_warmup, self.model
        own = (name for name in model.site_names if name not in model.config.tied)
        unfit = model.matrices(name for name in own if model.inits[name] is not Init.detectors)
        if not unfit:
            return
        optimizer = adamw([self._own(unfit)], lr=warmup.lr, weight_decay=warmup.weight_decay)
        for _ in range(warmup.steps):
            model.zero_grad()
            statistics = faithfulness_statistics(model)
            torch.autograd.backward(statistics["sum"] / statistics["count"])
            if self.shards is not None:
                self.shards.take_gradients(self.components)
            optimizer.step()
            self._gather(self.components)
        model.zero_grad()

    def set_moments(self, moments: Mapping[str, Tensor], *, in_place: bool) -> None:
        """Go on with these moments (none: a new optimiser).

        Args:
            moments: whole, or the pieces that `moments` gave.
            in_place: whether they end up in the memory of those before, where a recorded update finds them.
        """
        own = moments if self.shards is None else self.shards.cut(moments)
        with in_same_memory(self.optimizer) if in_place else nullcontext():
            self.optimizer.state.clear()
            load_state_tensors(self.optimizer, self._named_updated(), own)

    def moments(self) -> dict[str, Tensor]:
        """Moments and step counts by name, as `set_moments` takes them; training changes them.

        Of moments that are shared out, this rank's pieces.
        """
        return state_tensors(self.optimizer, self._named_updated())

    def whole_moments(self, moments: Mapping[str, Tensor], *, keep: bool) -> dict[str, Tensor]:
        """What `moments` gave, not in pieces, for which all ranks meet; nothing where it is not kept.

        Other tensors among it stay as they are.
        """
        if self.shards is not None:
            return self.shards.join(moments, self._named_parameters(), keep=keep)
        return dict(moments) if keep else {}

    def take_from_rank_0(self, others: list[Tensor]) -> None:
        """Go on from rank 0's moments and these tensors: on another kind of machine they may differ a little.

        Moments that are shared out are nobody else's, and stay as they are.
        """
        common = self.moments() if self.shards is None else {}
        distributed.take_from_rank_0([*others, *common.values()])

    def _gather(self, parameters: list[nn.Parameter]) -> None:
        if self.shards is not None:
            self.shards.gather(parameters)

    def _own(self, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
        return parameters if self.shards is None else self.shards.of(parameters)

    def _named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]

    def _named_updated(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, self._own([p])[0]) for name, p in self._named_parameters()]


def _clip(parameters: list[nn.Parameter], limit: float | None) -> None:
    if limit is not None:
        nn.utils.clip_grad_norm_(parameters, limit)


def _shards(wanted: Sharding, parameters: list[nn.Parameter]) -> "Shards | None":
    """The parameters shared out over ranks; None if that is not wanted, or if there is one rank."""
    if wanted is Sharding.none:
        return None
    if distributed.world_size() == 1:
        logger.info("train.shard=%s has no effect: there is one process, which keeps all", wanted.name)
        return None
    from spd_hydra.shards import Shards  # noqa: PLC0415

    return Shards(parameters)
