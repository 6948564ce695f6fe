"""Loss and gradients of one training step, as one compiled graph where possible."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spd_hydra import distributed
from spd_hydra.compiling import Kernel
from spd_hydra.loss.objective import Objective, ScheduledValues, StepLoss


class Step:
    """Computes the loss of a step and leaves its gradients in the parameters.

    Compiled, loss and gradients are one graph, a pure function of parameters, batch, draws and schedule.
    Nothing waits in memory between a forward and a backward pass, and a call costs little beyond its
    kernels, which for a toy model would otherwise be most of the time.

    Args:
        objective: the loss.
        compile: trace and compile the step; otherwise run it as it is written.
    """

    def __init__(self, objective: Objective, *, compile: bool) -> None:
        self._objective = objective
        self._module = _LossModule(objective)
        self._parameters = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        self._kernel = Kernel(self._flat) if compile else None
        self._schedule_keys: list[tuple[str, str]] = []

    def __call__(self, batch: Tensor, draws: Tensor, schedule: ScheduledValues) -> StepLoss:
        """Loss, terms and L0 of a batch; afterwards every parameter's `.grad` is that of the total."""
        if self._kernel is None:
            for parameter in self._parameters.values():
                parameter.grad = None
            loss = self._objective(batch, draws, schedule)
            torch.autograd.backward(loss.total)
            self._sum_over_ranks()
            return StepLoss(loss.total.detach(), loss.terms, loss.l0)
        self._schedule_keys = [(term, name) for term, own in schedule.items() for name in own]
        scheduled = [schedule[term][name] for term, name in self._schedule_keys]
        found = self._kernel(batch, draws, *scheduled, *self._parameters.values())
        n_terms = len(self._objective.losses.active_terms())
        n_sites = len(self._objective.model.site_names)
        total, values = found[0], found[1:]
        for parameter, gradient in zip(self._parameters.values(), values[n_terms + n_sites :], strict=True):
            parameter.grad = gradient
        return StepLoss(
            total,
            dict(zip(self._objective.losses.active_terms(), values[:n_terms], strict=True)),
            dict(zip(self._objective.model.site_names, values[n_terms : n_terms + n_sites], strict=True)),
        )

    def _sum_over_ranks(self) -> None:
        if distributed.world_size() == 1:
            return
        parameters = list(self._parameters.values())
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        for parameter, gradient in zip(parameters, distributed.global_sum(gradients), strict=True):
            parameter.grad = gradient

    def _flat(self, batch: Tensor, draws: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """The step as a function of tensors: total, terms, L0 by site, gradients."""
        scheduled = others[: len(self._schedule_keys)]
        schedule: ScheduledValues = {}
        for (term, name), value in zip(self._schedule_keys, scheduled, strict=True):
            schedule.setdefault(term, {})[name] = value
        values = [p.detach().requires_grad_() for p in others[len(scheduled) :]]
        parameters = dict(zip(self._parameters, values, strict=True))
        loss: StepLoss = functional_call(self._module, parameters, (batch, draws, schedule))
        gradients = torch.autograd.grad(loss.total, values, allow_unused=True, materialize_grads=True)
        gradients = tuple(distributed.global_sum(gradients))
        terms = [loss.terms[name] for name in self._objective.losses.active_terms()]
        l0 = [loss.l0[site] for site in self._objective.model.site_names]
        return loss.total.detach(), *terms, *l0, *gradients


class _LossModule(nn.Module):
    """The objective as a module, so that its parameters can be passed in as arguments."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.model = objective.model
        self._objective = objective

    def forward(self, batch: Tensor, draws: Tensor, schedule: ScheduledValues) -> StepLoss:
        return self._objective(batch, draws, schedule)
