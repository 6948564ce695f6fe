"""One step on a large batch, taken in parts that need less memory."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from spd_hydra import distributed
from spd_hydra.compiling import Kernel
from spd_hydra.loss.ascent import Sources
from spd_hydra.loss.base import Loss, Statistics
from spd_hydra.loss.objective import POSITIONS, SPARSITY, Objective, ScheduledValues, StepLoss, over_ranks
from spd_hydra.optimizer import Pieces
from spd_hydra.search import Search

Sums = dict[str, Statistics]
"""Statistics by term."""

Keys = list[tuple[str, str]]


class Parts(Protocol):
    """What draws the parts of a step: `SplitSampler`.

    Attributes:
        rows: of each part.
        rows_per_step: number of rows of the global batch.
    """

    @property
    def rows(self) -> Sequence[Tensor]: ...

    @property
    def rows_per_step(self) -> int: ...

    def __call__(self, step: int, part: int, /) -> tuple[Tensor, Tensor]:
        """Batch and random numbers of a part."""
        ...


class AccumulatedStep:
    """Computes the loss of a step from parts of the batch and leaves its gradients in the parameters.

    The loss is L = f(Σ_b s_b), with the statistics s_b of the parts, and its gradient Σ_b w · ∂s_b/∂θ with
    w = ∂f/∂s at the sum: that of the whole batch, however it is cut. For a mean over positions w follows from
    the sizes of the parts. For other terms a first pass over all parts collects the sums, without gradients.
    What an adversary looks for in the whole batch is searched for before, and stays fixed then. Ranks cut
    their own rows; they meet for the search, for those sums, for the loss and for the gradients.

    Args:
        objective: the loss.
        sampler: draws the parts.
        compile: trace and compile what is done with a part; otherwise run it as it is written.
        pieces: as for `Step`; ranks then meet for the gradients of every part.
    """

    def __init__(
        self, objective: Objective, sampler: Parts, *, compile: bool, pieces: Pieces | None = None
    ) -> None:
        self._objective, self._sampler = objective, sampler
        self._module = _Part(objective)
        self._parameters = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self._pieces = pieces
        own = list(self._parameters.values())
        self._holders = own if pieces is None else pieces.of(own)
        self._search = Search(objective, compile=compile)
        self._first = Kernel(self._flat_first) if compile else self._flat_first
        self._second = Kernel(self._flat_second) if compile else self._flat_second
        self._schedule_keys: Keys = []
        self._source_keys: Keys = []
        self._weight_keys: Keys = []
        self._first_keys: Keys = []  # of what each pass sums
        self._second_keys: Keys = []
        self._is_by_position: bool | None = None if objective.padded else True

    def __call__(self, step: int, schedule: ScheduledValues) -> StepLoss:
        """Loss, terms and L0 of the batch of a step; the optimiser's gradients are those of the total."""
        for holder in self._holders:
            holder.grad = None
        self._schedule_keys, scheduled = _flat(schedule)
        self._source_keys, sources = _flat(self._search(lambda: self.parts(step)))
        terms = self._terms_that_are_no_means(step)
        self._module.weighted = tuple(terms)
        shares = self._shares(step)
        self._weight_keys, weights = _flat(
            self._weights(step, terms, [*scheduled, *sources]) if terms else {}
        )
        sums: list[Tensor] = []
        gradients: list[Tensor] = []
        for part, share in enumerate(shares):
            own_sums, own_gradients = self._of_part(step, part, share, [*scheduled, *sources, *weights])
            sums, gradients = _added(sums, own_sums), _added(gradients, own_gradients)
        if self._pieces is None:
            gradients = distributed.global_sum(gradients)
        for holder, gradient in zip(self._holders, gradients, strict=True):
            holder.grad = gradient
        return self._objective.loss_of(over_ranks(_nested(self._second_keys, sums)))

    def parts(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batch and random numbers of every part of a step."""
        return (self._sampler(step, part) for part in range(len(self._sampler.rows)))

    def _of_part(
        self, step: int, part: int, share: Tensor, numbers: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """What a part adds to the sums and to the gradients."""
        batch, draws = self._sampler(step, part)
        found = self._second(batch, draws, share, *numbers, *self._parameters.values())
        sums, gradients = found[: len(self._second_keys)], found[len(self._second_keys) :]
        if self._pieces is not None:  # now, so that the whole gradients of one part alone are held
            gradients = self._pieces.sums(self._parameters.values(), gradients)
        return sums, gradients

    def _terms_that_are_no_means(self, step: int) -> dict[str, Loss]:
        """Active terms whose gradient needs the sums over the whole batch."""
        if self._is_by_position is None:
            batch, _ = self._sampler(step, 0)
            self._is_by_position = self._objective.model.clean_pass(batch).output.shape[:-1] == batch.shape
        active = self._objective.losses.active_terms()
        # With padding, an output that is not per position is a mean over rows, while others are over tokens.
        return {name: term for name, term in active.items() if not (term.is_mean and self._is_by_position)}

    def _shares(self, step: int) -> list[Float[Tensor, ""]]:
        """The share of the global batch that each part is: of its positions, without padding."""
        device = self._objective.model.device
        if not self._objective.padded:
            rows = [len(own) / self._sampler.rows_per_step for own in self._sampler.rows]
            return [torch.full((), share, device=device) for share in rows]  # no wait for a GPU
        parts = range(len(self._sampler.rows))
        sizes = torch.stack([(self._sampler(step, part)[0] >= 0).sum(dtype=torch.float32) for part in parts])
        total, number = distributed.global_sum([sizes.sum(), torch.full_like(sizes[0], len(parts))])
        # Where all is padding, equal ones: what no position says anything of has gradients all the same.
        return list(torch.where(total > 0, sizes / total.clamp(min=1), 1 / number))

    def _weights(self, step: int, terms: Mapping[str, Loss], numbers: Sequence[Tensor]) -> Sums:
        """∂L/∂s of each statistic of the given terms, at their sums over the global batch."""
        sums: list[Tensor] = []
        for part in range(len(self._sampler.rows)):
            batch, draws = self._sampler(step, part)
            sums = _added(sums, self._first(batch, draws, *numbers, *self._parameters.values()))
        found = over_ranks(_nested(self._first_keys, sums))
        positions = found.pop(SPARSITY)[POSITIONS]
        keys, values = _flat(found)
        values = [value.detach().requires_grad_() for value in values]
        at = _nested(keys, values)
        with torch.enable_grad():
            parts = [term.weight(at[name]) * term.value(at[name], positions) for name, term in terms.items()]
            slopes = torch.autograd.grad(
                torch.stack(parts).sum(), values, allow_unused=True, materialize_grads=True
            )
        return _nested(keys, slopes)

    @torch.no_grad()
    def _flat_first(self, batch: Tensor, draws: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Sums of the terms that are no means, and the number of positions."""
        given = iter(others)
        schedule, sources = _nested(self._schedule_keys, given), _nested(self._source_keys, given)
        parameters = dict(zip(self._parameters, given, strict=True))
        sums: Sums = functional_call(self._module, parameters, (batch, draws, schedule, sources))
        self._first_keys, values = _flat(sums)
        return tuple(values)

    def _flat_second(
        self, batch: Tensor, draws: Tensor, share: Tensor, *others: Tensor
    ) -> tuple[Tensor, ...]:
        """Sums of all terms and of active subcomponents; then what the part adds to the gradients."""
        given = iter(others)
        schedule, sources = _nested(self._schedule_keys, given), _nested(self._source_keys, given)
        weights = _nested(self._weight_keys, given)
        values = [p.detach().requires_grad_() for p in given]
        parameters = dict(zip(self._parameters, values, strict=True))
        sums, gradients = functional_call(
            self._module, parameters, (batch, draws, schedule, sources, share, weights, values)
        )
        self._second_keys, flat_sums = _flat(sums)
        return *(value.detach() for value in flat_sums), *(gradient.contiguous() for gradient in gradients)


class _Part(nn.Module):
    """What is computed on one part, as a module, so that parameters can be passed in.

    Attributes:
        weighted: the terms whose statistics get weights; the others are means.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.model, self.adversary = objective.model, objective.adversary
        self.weighted: tuple[str, ...] = ()
        self._objective = objective

    def forward(
        self,
        batch: Tensor,
        draws: Tensor,
        schedule: ScheduledValues,
        sources: Mapping[str, Sources],
        share: Tensor | None = None,
        weights: Sums | None = None,
        parameters: Sequence[Tensor] = (),
    ) -> Sums | tuple[Sums, tuple[Tensor, ...]]:
        """The sums that weights are made of; with weights, all sums and the part's share of the gradients."""
        objective, active = self._objective, self._objective.losses.active_terms()
        inputs = objective.inputs(batch)
        if share is None or weights is None:
            own_draws = objective.draws_of(active, draws)
            terms = {name: active[name] for name in self.weighted}
            own = torch.cat([own_draws[name] for name in terms], dim=-1)
            sums = objective.statistics(inputs, terms, own, schedule, sources)
            return sums | {SPARSITY: {POSITIONS: inputs.n_positions}}
        sums = objective.statistics(inputs, active, draws, schedule, sources)
        parts = [
            (weights[name][key] * value).sum() for name in self.weighted for key, value in sums[name].items()
        ]
        parts += [
            share * term.weight(sums[name]) * term.value(sums[name], inputs.n_positions)
            for name, term in active.items()
            if name not in self.weighted
        ]
        gradients = torch.autograd.grad(
            torch.stack(parts).sum(), parameters, allow_unused=True, materialize_grads=True
        )
        return sums | {SPARSITY: objective.sparsity(inputs)}, gradients


def _flat(tree: Mapping[str, Mapping[str, Tensor]]) -> tuple[Keys, list[Tensor]]:
    """Names and tensors of a tree of two levels."""
    keys = [(name, key) for name, own in tree.items() for key in own]
    return keys, [tree[name][key] for name, key in keys]


def _nested(keys: Keys, values: Sequence[Tensor] | Iterator[Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tree that `_flat` took apart; of an iterator, only as many values as there are names are taken."""
    given = iter(values)
    tree: dict[str, dict[str, Tensor]] = {}
    for name, key in keys:
        tree.setdefault(name, {})[key] = next(given)
    return tree


def _added(sums: Sequence[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
    """Sums with one part more. Not in place: one gradient may be that of two parameters."""
    return [a + b for a, b in zip(sums, more, strict=True)] if sums else list(more)
