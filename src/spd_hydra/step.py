"""Loss and gradients of one training step, as one compiled graph where possible."""

import abc
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from spd_hydra import distributed
from spd_hydra.compiling import Kernel
from spd_hydra.loss.base import Statistics
from spd_hydra.loss.objective import Objective, ScheduledValues, StepLoss
from spd_hydra.optimizer import Pieces
from spd_hydra.places import call


class _FlatStep(abc.ABC):
    """A step as a function of tensors alone, which can be compiled: `_flat`."""

    def __init__(self, objective: Objective, *, compile: bool) -> None:
        self._objective = objective
        self._kernel = Kernel(self._flat) if compile else None
        self._schedule_keys: list[tuple[str, str]] = []

    @property
    def is_compiled(self) -> bool:
        """Whether a call runs compiled kernels."""
        return self._kernel is not None

    @abc.abstractmethod
    def _flat(self, batch: Tensor, draws: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Total, terms, L0 by site, gradients; the others are what is scheduled, then `_run`'s tensors."""

    def _run(
        self, batch: Tensor, draws: Tensor, schedule: ScheduledValues, tensors: Iterable[Tensor]
    ) -> tuple[StepLoss, tuple[Tensor, ...]]:
        self._schedule_keys = [(term, name) for term, own in schedule.items() for name in own]
        scheduled = [schedule[term][name] for term, name in self._schedule_keys]
        run = self._flat if self._kernel is None else self._kernel
        values = iter(run(batch, draws, *scheduled, *tensors))
        terms, sites = self._objective.losses.active_terms(), self._objective.model.site_names
        loss = StepLoss(
            next(values), {name: next(values) for name in terms}, {site: next(values) for site in sites}
        )
        return loss, tuple(values)

    def _numbers(self, loss: StepLoss) -> tuple[Tensor, ...]:
        """Total, terms and L0 in the order in which `_run` reads them; sites run in an order of their own."""
        terms, sites = self._objective.losses.active_terms(), self._objective.model.site_names
        return loss.total.detach(), *(loss.terms[name] for name in terms), *(loss.l0[site] for site in sites)

    def _schedule(self, given: Iterator[Tensor]) -> ScheduledValues:
        """What is scheduled, from the first of the tensors that `_flat` was given."""
        schedule: ScheduledValues = {}
        for term, name in self._schedule_keys:
            schedule.setdefault(term, {})[name] = next(given)
        return schedule


class Step(_FlatStep):
    """Computes the loss of a step and leaves its gradients in the parameters.

    Compiled, loss and gradients are one graph, a pure function of parameters, batch, draws and schedule.
    Nothing waits in memory between a forward and a backward pass, and a call costs little beyond its
    kernels, which for a toy model would otherwise be most of the time.

    Args:
        objective: the loss.
        compile: trace and compile the step; otherwise run it as it is written.
        pieces: how the optimiser's work is shared out; a rank then keeps the gradients of its pieces alone.
    """

    def __init__(self, objective: Objective, *, compile: bool, pieces: Pieces | None = None) -> None:
        self._module = _LossModule(objective)
        self._parameters = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self._pieces = pieces
        own = list(self._parameters.values())
        self._holders = own if pieces is None else pieces.of(own)
        super().__init__(objective, compile=compile)

    def __call__(self, batch: Tensor, draws: Tensor, schedule: ScheduledValues) -> StepLoss:
        """Loss, terms and L0 of a batch; afterwards the optimiser's gradients are those of the total."""
        if self._kernel is None:
            for parameter in [*self._parameters.values(), *self._holders]:
                parameter.grad = None
            loss = self._objective(batch, draws, schedule)
            torch.autograd.backward(loss.total)
            self._sum_over_ranks()
            return StepLoss(loss.total.detach(), loss.terms, loss.l0)
        loss, gradients = self.compute(batch, draws, schedule)
        self.leave(gradients)
        return loss

    def compute(
        self, batch: Tensor, draws: Tensor, schedule: ScheduledValues
    ) -> tuple[StepLoss, tuple[Tensor, ...]]:
        """The loss and the gradients of all parameters; nothing is left anywhere."""
        loss, gradients = self._run(batch, draws, schedule, self._parameters.values())
        if self._pieces is not None:
            gradients = tuple(self._pieces.sums(self._parameters.values(), gradients))
        return loss, gradients

    def leave(self, gradients: Sequence[Tensor]) -> None:
        """Make what `compute` gave the gradients that the optimiser reads."""
        for holder, gradient in zip(self._holders, gradients, strict=True):
            holder.grad = gradient

    def _sum_over_ranks(self) -> None:
        if self._pieces is None and distributed.world_size() == 1:
            return
        parameters = list(self._parameters.values())
        gradients = map(_taken, parameters)  # as they are sent, so that each is free once it is summed
        if self._pieces is None:
            self.leave(distributed.global_sum(gradients))
        else:
            self.leave(self._pieces.sums(parameters, gradients))

    def _flat(self, batch: Tensor, draws: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """The step as a function of tensors: total, terms, L0 by site, gradients, unsummed if shared."""
        given = iter(others)
        schedule = self._schedule(given)
        values = [p.detach().requires_grad_() for p in given]
        parameters = dict(zip(self._parameters, values, strict=True))
        # Inside, gradients too: what a checkpoint computes again has to see the same parameters.
        loss, gradients = functional_call(self._module, parameters, (batch, draws, schedule, values))
        if self._pieces is None:
            gradients = distributed.global_sum(gradients)
        gradients = tuple(gradient.contiguous() for gradient in gradients)
        return *self._numbers(loss), *gradients


class Ascent:
    """Computes the gradients of lasting adversaries alone, for ascents between two steps.

    A term is Σ sum / Σ count over the parts of the batch, where the counts do not depend on sources. So its
    gradient is coeff · Σ ∂sum / Σ count, however the batch is cut.

    Args:
        objective: the loss.
        compile: as for `Step`.
    """

    def __init__(self, objective: Objective, *, compile: bool) -> None:
        self._module = _AgainstModule(objective)
        self._parameters = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self._terms, self._adversary = objective.adversary.terms, objective.adversary
        self._run = Kernel(self._flat) if compile else self._flat

    def __call__(self, parts: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Leave in every source's `.grad` the gradient of its term on a batch.

        Args:
            parts: of this rank's rows, each with its draws of the step.
        """
        total: list[Tensor] = []
        for batch, draws in parts:
            own = self._run(batch, draws, *self._parameters.values())
            total = [a + b for a, b in zip(total, own, strict=True)] if total else list(own)
        summed = iter(distributed.global_sum(total))
        counts = {name: next(summed) for name in self._terms}
        for name, term in self._terms.items():
            for source in self._adversary.of(name).values():
                source.grad = next(summed) * (term.coeff / counts[name])

    def _flat(self, batch: Tensor, draws: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Of some rows: the count of every term; then of every term the gradients of its sum."""
        names = {id(own): name for name, own in self._parameters.items()}
        wanted = [names[id(own)] for term in self._terms for own in self._adversary.of(term).values()]
        parameters = {
            name: value.detach().requires_grad_(name in wanted)
            for name, value in zip(self._parameters, values, strict=True)
        }
        statistics = functional_call(self._module, parameters, (batch, draws))
        total = torch.stack([own["sum"] for own in statistics.values()]).sum()
        gradients = torch.autograd.grad(
            total, [parameters[name] for name in wanted], allow_unused=True, materialize_grads=True
        )
        counts = [own["count"] for own in statistics.values()]
        return *counts, *(gradient.contiguous() for gradient in gradients)


class StackedStep(_FlatStep):
    """Losses and gradients of several decompositions of one shape, in one step.

    Whatever is their own has a leading replica axis: parameters, target, batch, draws. The objective is
    mapped over it (`torch.vmap`), so that as many kernels are launched as for one of them; nothing is shared
    between replicas, and what happens to one does not touch the others.

    Args:
        objectives: one for each replica; their parameters become views of `parameters`.
        compile: trace and compile the step; otherwise run it as it is written.
    """

    def __init__(self, objectives: Sequence[Objective], *, compile: bool) -> None:
        models = [objective.model for objective in objectives]
        models[0].roots = frozenset.intersection(*(model.roots for model in models))
        self._module = _LossModule(objectives[0])
        modules = [dict(_LossModule(objective).named_parameters()) for objective in objectives]
        own = [name for name, p in modules[0].items() if p.requires_grad]
        self.parameters = {
            name: nn.Parameter(torch.stack([m[name].detach() for m in modules])) for name in own
        }
        for replica, parameters in enumerate(modules):
            for name in own:
                parameters[name].data = self.parameters[name].data[replica]
        targets = [_frozen_tensors(_LossModule(objective)) for objective in objectives]
        self._frozen = {name: torch.stack([target[name] for target in targets]) for name in targets[0]}
        super().__init__(objectives[0], compile=compile)

    def __call__(self, batch: Tensor, draws: Tensor, schedule: ScheduledValues) -> StepLoss:
        """Losses, terms and L0, each `[replicas]`; every stacked parameter's `.grad` is set.

        Args:
            batch: `[replicas, batch, …]`.
            draws: `[replicas, *positions, columns]`.
            schedule: the same for all.
        """
        loss, gradients = self.compute(batch, draws, schedule)
        self.leave(gradients)
        return loss

    def compute(
        self, batch: Tensor, draws: Tensor, schedule: ScheduledValues
    ) -> tuple[StepLoss, tuple[Tensor, ...]]:
        """What a call computes, and the gradients of all stacked parameters; nothing is left anywhere."""
        return self._run(batch, draws, schedule, [*self.parameters.values(), *self._frozen.values()])

    def leave(self, gradients: Sequence[Tensor]) -> None:
        """Make what `compute` gave the stacked parameters' gradients."""
        for parameter, gradient in zip(self.parameters.values(), gradients, strict=True):
            parameter.grad = gradient

    def _flat(self, batch: Tensor, draws: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """The step as a function of tensors: totals, terms, L0 by site, gradients."""
        given = iter(others)
        schedule = self._schedule(given)
        parameters = {name: next(given).detach().requires_grad_() for name in self.parameters}
        frozen = {name: next(given) for name in self._frozen}

        def one(own: dict[str, Tensor], batch: Tensor, draws: Tensor) -> StepLoss:
            loss: StepLoss = call(self._module, own, (batch, draws, schedule))
            return loss

        with sdpa_kernel(SDPBackend.MATH):  # fused attention knows no replica axis
            loss = torch.vmap(one)(parameters | frozen, batch, draws)
        # No replica's loss depends on another's parameters: the gradient of the sum is that of each.
        gradients = torch.autograd.grad(
            loss.total.sum(), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        return *self._numbers(loss), *(gradient.contiguous() for gradient in gradients)


class _LossModule(nn.Module):
    """The objective as a module, so that parameters, and the target, can be passed in as arguments."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.model, self.adversary = objective.model, objective.adversary
        # It shares the target's tensors, which are passed in for both.
        self.patched = objective.model.patched.module
        self._objective = objective

    def forward(
        self, batch: Tensor, draws: Tensor, schedule: ScheduledValues, parameters: Sequence[Tensor] = ()
    ) -> StepLoss | tuple[StepLoss, tuple[Tensor, ...]]:
        """The loss, and its gradients if parameters are given."""
        loss = self._objective(batch, draws, schedule)
        if not parameters:
            return loss
        return loss, torch.autograd.grad(loss.total, parameters, allow_unused=True, materialize_grads=True)


class _AgainstModule(_LossModule):
    """What the adversary climbs, as a module."""

    def forward(self, batch: Tensor, draws: Tensor) -> dict[str, Statistics]:  # type: ignore[override]
        return self._objective.against(batch, draws)


def _taken(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter, which has none then."""
    gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    parameter.grad = None
    return gradient


def _frozen_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are not trained, each once."""
    parameters = {name: p.detach() for name, p in module.named_parameters() if not p.requires_grad}
    return parameters | dict(module.named_buffers())
