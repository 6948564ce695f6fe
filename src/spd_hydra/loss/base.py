"""What a loss term must offer, and what all terms of one batch share."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spd_hydra.ci_fn.sigmoid import CausalImportance
from spd_hydra.decomposition.clean_pass import CleanPass, Reuse
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.loss.divergence import Divergence
from spd_hydra.section import Section, option

Statistics = dict[str, Tensor]
"""Sums over positions that can be added over batches and ranks before `Loss.value` is taken."""


@dataclasses.dataclass(frozen=True)
class LossInputs:
    """One batch, as every term of the loss sees it.

    Attributes:
        model: the decomposed model.
        batch: the target's input.
        reuse: the clean pass and the clean activations.
        ci: causal importances by site.
        draws: this term's own random numbers, from U(0, 1), as many columns as it asked for.
        divergence: distance between the masked and the target's output.
        schedule: this term's scheduled parameters at this step (see `Loss.scheduled`).
        target_normaliser: `log_normaliser` of the target's logits, which all passes share; None for `mse`.
        at_once: the gradient of a masked pass is taken right after it, so that it keeps no activations.
        recompute: a masked pass keeps the inputs of blocks alone and computes each block again.
        sources: this term's own sources by site: lasting ones (see `loss/persistent_recon.py`), or those
            that an ascent on the whole batch has found before its parts are looked at; else none.
        valid: False at positions that are padding and count nowhere; None: all count.
    """

    model: DecomposedModel
    batch: Tensor
    reuse: Reuse
    ci: Mapping[str, CausalImportance]
    draws: Float[Tensor, "*positions columns"]
    divergence: Divergence
    schedule: Mapping[str, Tensor]
    target_normaliser: Float[Tensor, "*positions 2"] | None = None
    at_once: bool = False
    recompute: bool = False
    sources: Mapping[str, Float[Tensor, "n_sources columns"]] = dataclasses.field(default_factory=dict)
    valid: Bool[Tensor, "*positions"] | None = None

    @property
    def n_positions(self) -> Float[Tensor, ""]:
        """Number of positions in the batch, without padding."""
        if self.valid is not None:
            return self.valid.sum(dtype=torch.float32)
        one_site = next(iter(self.ci.values())).lower
        return torch.full((), float(one_site[..., 0].numel()), device=one_site.device)  # no wait for a GPU

    @property
    def clean(self) -> CleanPass:
        """The target's own pass on this batch."""
        return self.reuse.clean


@dataclasses.dataclass(kw_only=True)
class Loss(Section):
    """A term of the training loss, which is also a quantity of the evaluation.

    `statistics` adds up over a batch; statistics of several batches or ranks may be added; `value`
    then gives the number. So the value is that of all the data, however it was cut.

    Attributes:
        always_measured: whether evaluations measure the term also where it is not trained on.
    """

    always_measured: ClassVar[bool] = True

    coeff: float = option(0.0, "weight of the term in the training loss; 0: not computed", ge=0)

    def columns(self, model: DecomposedModel) -> int:
        """Random numbers per position that `statistics` takes."""
        return 0

    def statistics(self, inputs: LossInputs) -> Statistics:
        """Additive statistics of the term on one batch."""
        raise NotImplementedError

    def value(self, statistics: Statistics, reference_positions: Tensor | float) -> Float[Tensor, ""]:
        """The term, from accumulated statistics.

        Args:
            statistics: sums over everything that was seen.
            reference_positions: positions in a global training batch, for terms that depend on it.
        """
        return mean(statistics["sum"], statistics["count"])

    def weight(self, statistics: Statistics) -> Float[Tensor, ""] | float:
        """What the value counts in the training loss: `coeff`, unless it moves during training."""
        return self.coeff

    def passes(self, model: DecomposedModel) -> int:
        """Masked passes with a backward pass that `statistics` makes."""
        return 0

    @property
    def is_mean(self) -> bool:
        """Whether the value of a batch is the mean of its parts' values, each weighted with its positions."""
        return False

    def scheduled(self, progress: float) -> dict[str, float]:
        """Parameters that change during training, at `progress` in [0, 1]."""
        return {}


def statistics_problem(term: Loss, found: Any) -> str | None:
    """What is wrong with what `statistics` of a term gave; None: nothing.

    Args:
        term: the term.
        found: what it gave, of a batch with positions.
    """
    method = f"{type(term).__name__}.statistics"
    contract = "it must return a dictionary of tensors, sums over the positions of the batch"
    own_value = type(term).value is not Loss.value
    if not own_value:
        contract += ": sum and count, each a single number, whose ratio is the term"
    if not isinstance(found, Mapping):
        return f"{method} returned {_told(found)}; {contract}"
    if wrong := [key for key, value in found.items() if not isinstance(value, Tensor)]:
        return f"{method} returned {_told(found[wrong[0]])} as {wrong[0]}; {contract}"
    if own_value:
        value: Any = term.value(dict(found), 1.0)
        is_number = isinstance(value, Tensor) and value.dim() == 0
        told = f"{type(term).__name__}.value returned {_told(value)}; it must return a tensor of no axes"
        return None if is_number else told
    if missing := [key for key in ("sum", "count") if key not in found]:
        return f"{method} returned no {' and no '.join(missing)}; {contract}"
    if vectors := [key for key in ("sum", "count") if found[key].dim()]:
        return f"{method} returned {_told(found[vectors[0]])} as {vectors[0]}; {contract}"
    return None


def _told(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a tensor of shape {list(found.shape)}"
    return type(found).__name__


def mean(total: Tensor, count: Float[Tensor, ""]) -> Tensor:
    """A sum over its count; over nothing, as a part of a batch that is all padding, 0 and not 0 / 0."""
    return total / torch.where(count == 0, 1.0, count)
