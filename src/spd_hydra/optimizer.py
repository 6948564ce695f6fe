"""The optimiser of a decomposition, and its state as named tensors."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

_FACTOR = "lr_factor"

NamedParameters = list[tuple[str, nn.Parameter]]


class Pieces(Protocol):
    """How the optimiser's work is shared out over ranks: `shards.Shards`."""

    def of(self, parameters: Iterable[nn.Parameter], /) -> list[nn.Parameter]:
        """What the optimiser of this rank changes of each parameter, and takes the gradient of."""

    def sums(self, parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor], /) -> list[Tensor]:
        """The gradients of these, summed over ranks, from the parameters' gradients on this rank's rows."""


def adamw(
    groups: Iterable[Iterable[nn.Parameter]],
    *,
    lr: float,
    weight_decay: float,
    factors: Iterable[float] | None = None,
) -> torch.optim.AdamW:
    """AdamW with default betas, as one fused kernel per group.

    Args:
        groups: of parameters.
        lr: learning rate.
        weight_decay: decoupled.
        factors: of each group, on the learning rate; None: 1.
    """
    chosen = [list(group) for group in groups]
    made = [
        {"params": own, "lr": lr * factor, _FACTOR: factor}
        for own, factor in zip(chosen, factors or [1.0] * len(chosen), strict=True)
    ]
    return torch.optim.AdamW(made, lr=lr, weight_decay=weight_decay, fused=True)


def group_rates(optimizer: torch.optim.Optimizer, lr: float) -> list[float]:
    """The learning rate of each group of `adamw`, at a rate of the optimiser."""
    return [lr * group[_FACTOR] for group in optimizer.param_groups]


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Let the next step of `adamw` have this rate, times the factor of each group."""
    for group, own in zip(optimizer.param_groups, group_rates(optimizer, lr), strict=True):
        group["lr"] = own


def state_tensors(optimizer: torch.optim.Optimizer, parameters: NamedParameters) -> dict[str, Tensor]:
    """Moments and step counts, as `<what>.<parameter name>`, sorted; empty before the first step.

    The order is that of the names alone, so that it is the same on all ranks, however the state came about.
    """
    found: dict[str, Tensor] = {}
    for name, parameter in parameters:
        for what, value in optimizer.state.get(parameter, {}).items():
            found[f"{what}.{name}"] = value
    return dict(sorted(found.items()))


def is_step_count(key: str) -> bool:
    """Whether a tensor of this name in `state_tensors` counts steps; others have the parameter's shape."""
    return key.startswith("step.")


def load_state_tensors(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, tensors: Mapping[str, Tensor]
) -> None:
    """Set what `state_tensors` gave.

    Raises:
        ValueError: the state belongs to other parameters.
    """
    by_name = dict(parameters)
    for key, value in tensors.items():
        what, _, name = key.partition(".")
        parameter = by_name.get(name)
        if parameter is None:
            raise ValueError(f"optimiser state of {name!r} fits no parameter of this model")
        # A step count is kept where fused AdamW wants it: on the parameter's device, in float32.
        optimizer.state[parameter][what] = value.to(parameter.device).clone()


@contextlib.contextmanager
def in_same_memory(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The state that the block sets ends up in the tensors of the state before it; what it does not set is 0.

    For an update that was recorded on these tensors. A state of zeros is that of a new optimiser.
    """
    before = {parameter: dict(state) for parameter, state in optimizer.state.items()}
    yield
    with torch.no_grad():
        for parameter, state in before.items():
            given = optimizer.state.get(parameter, {})
            for what, value in state.items():
                if what in given:
                    value.copy_(given[what])
                else:
                    value.zero_()
            optimizer.state[parameter] = state
