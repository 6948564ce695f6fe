"""Training of toy targets from a seed: one run of a recipe, and what a recipe consists of."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn
from torch.optim.adamw import adamw

from spd_hydra.compiling import can_compile
from spd_hydra.model.base import TargetSpec
from spd_hydra.schedule import Schedule
from spd_hydra.section import Problem, Section, option

BatchSource = Callable[[Int32[Tensor, "2"], Int32[Tensor, " batch"]], Tensor]
StepReport = Callable[[int], None]

_EAGER_BLOCK = 65_536  # numbers drawn at once: small enough for the cache, many enough to hide call overhead
_COMPILE_ABOVE = 500_000_000  # numbers drawn in all: eager drawing takes longer than compiling from here on
_SINGLE_THREAD_BELOW = 65_536  # numbers per batch: waking a second thread costs more than it does
_LOOKS = 20  # looks per run at whether it can still succeed
_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(kw_only=True)
class TargetTraining(Section):
    """How a toy target is trained: AdamW with default betas, retried until the target is certified."""

    steps: int = option(10_000, "number of optimiser steps", ge=1)
    batch_size: int = option(1024, "inputs per step", ge=1)
    lr: float = option(5e-3, "learning rate of AdamW", gt=0, le=1)
    lr_schedule: Schedule = option(default_factory=Schedule, help="how the learning rate moves")
    weight_decay: float = option(0.01, "decoupled weight decay of AdamW", ge=0, le=1)
    max_tries: int = option(100, "seeds to try until the target is certified", ge=1)
    max_loss: float | None = option(
        None, "certified: loss of the trained target on fresh data, at most; null asks nothing", gt=0
    )

    def problems(self) -> Iterator[Problem]:
        """Adds: the rows of all batches are numbered with 32 bits."""
        yield from super().problems()
        if self.steps * self.batch_size >= 2**31:
            yield Problem(
                "steps", f"got {self.steps}, must be < 2^31 / batch_size = {2**31 // self.batch_size}"
            )


@dataclasses.dataclass(kw_only=True)
class TrainableTarget(TargetSpec):
    """A toy target that is trained in the process, from a seed."""

    training: TargetTraining = option(default_factory=TargetTraining, help="how the target is trained")
    held_out_rows: ClassVar[int] = 65_536  # on which the loss of a trained target is measured

    def training_loss(self, module: nn.Module, batch: Tensor) -> Float[Tensor, ""]:
        """The loss of one batch that training minimises."""
        raise NotImplementedError

    def gradients(self, module: nn.Module, batch: Tensor) -> list[Tensor]:
        """Gradients of `training_loss`, in the order of `trained_parameters`.

        A target may override this by something faster that gives the same numbers.
        """
        return list(torch.autograd.grad(self.training_loss(module, batch), trained_parameters(module)))

    def hopeless(self, module: nn.Module) -> bool:
        """Whether this half-trained module can no longer be certified one day: its run then ends early."""
        return False


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that training moves; a frozen one has `requires_grad` unset from the start."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def train(
    spec: TrainableTarget,
    module: nn.Module,
    batches: BatchSource,
    key: Int32[Tensor, "2"],
    *,
    may_give_up: bool = True,
    report: StepReport | None = None,
) -> bool:
    """Train a module in place by the recipe of its spec.

    Step i sees rows i * batch_size … of the one endless batch that belongs to the key.

    Args:
        module: on the device on which to train.
        may_give_up: end early when the spec finds the run hopeless.
        report: called now and then with the number of steps done.

    Returns:
        Whether all steps were taken.
    """
    recipe = spec.training
    optimiser = _AdamW(trained_parameters(module), recipe.weight_decay)
    look_every = max(recipe.steps // _LOOKS, 1)
    device = optimiser.parameters[0].device
    with _suitable_threads(spec, batches, key, device):
        for step, batch in enumerate(_stream(recipe, batches, key.to(device))):
            gradients = spec.gradients(module, batch)
            optimiser.step(gradients, recipe.lr * recipe.lr_schedule.factor(step, recipe.steps))
            if (step + 1) % look_every == 0:
                if report is not None:
                    report(step + 1)
                if may_give_up and spec.hopeless(module):
                    return False
    return True


@torch.no_grad()
def fresh_loss(
    spec: TrainableTarget, module: nn.Module, batches: BatchSource, key: Int32[Tensor, "2"]
) -> float:
    """The training loss on rows that no step has seen, as many as the spec says."""
    device = next(module.parameters()).device
    rows = torch.arange(spec.held_out_rows, dtype=torch.int32, device=device)
    parts = torch.split(rows, _ROWS_AT_ONCE)
    losses = [spec.training_loss(module, batches(key.to(device), part)) for part in parts]
    return torch.stack(losses).mean().item()


class _AdamW:
    """AdamW without the bookkeeping of `torch.optim`, which costs more than the step of a tiny model."""

    def __init__(self, parameters: list[nn.Parameter], weight_decay: float) -> None:
        self.parameters = parameters
        self.weight_decay = weight_decay
        self.means = [torch.zeros_like(p) for p in parameters]
        self.squares = [torch.zeros_like(p) for p in parameters]
        self.counts = [torch.zeros((), device=p.device) for p in parameters]

    @torch.no_grad()
    def step(self, gradients: list[Tensor], lr: float) -> None:
        adamw(
            list(self.parameters),
            # The fused kernel reads memory front to back, whatever the strides (seen with torch 2.13, CPU).
            [gradient.contiguous() for gradient in gradients],
            self.means,
            self.squares,
            [],
            self.counts,
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=lr,
            weight_decay=self.weight_decay,
            eps=1e-8,
            maximize=False,
        )


def _stream(recipe: TargetTraining, batches: BatchSource, key: Int32[Tensor, "2"]) -> Iterator[Tensor]:
    """One batch per step, drawn for many small batches at once or for a large batch in parts."""
    size = recipe.batch_size
    width = _width(batches, key)
    block = max(_EAGER_BLOCK // width, 1)
    draw = batches
    if key.device.type != "cpu":
        block = max(64 * block, size)
    elif (
        recipe.steps * size * width > _COMPILE_ABOVE
        and getattr(batches, "traceable", False)
        and can_compile(key.device.type)
    ):
        block = size
        # Small intermediate results (a word per row or column) are kept, not computed again for each number.
        draw = torch.compile(
            batches, fullgraph=True, dynamic=False, options={"realize_opcount_threshold": 16}
        )
    steps_at_once = max(block // size, 1)
    for first in range(0, recipe.steps, steps_at_once):
        last = min(first + steps_at_once, recipe.steps)
        rows = torch.arange(first * size, last * size, dtype=torch.int32, device=key.device)
        drawn = torch.cat([draw(key, part) for part in torch.split(rows, min(block, len(rows)))])
        yield from torch.split(drawn, size)


def _width(batches: BatchSource, key: Int32[Tensor, "2"]) -> int:
    """Numbers per row."""
    return batches(key, torch.zeros(1, dtype=torch.int32, device=key.device)).numel()


@contextlib.contextmanager
def _suitable_threads(
    spec: TrainableTarget, batches: BatchSource, key: Int32[Tensor, "2"], device: torch.device
) -> Iterator[None]:
    """One thread for tiny batches of vectors; a token, which becomes a vector, costs more than a number."""
    before = torch.get_num_threads()
    is_small = spec.training.batch_size * _width(batches, key) < _SINGLE_THREAD_BELOW
    if device.type == "cpu" and is_small and spec.vocab_size() is None:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
