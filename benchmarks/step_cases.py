"""What `step_time.py` compares: the same training step, compiled, uncompiled and plain."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from benchmarks.plain_step import PlainStep
from torch import Tensor

from spd_hydra import rng
from spd_hydra.build import Parts, assemble, device_of, untrained_target
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.graph import REHEARSALS
from spd_hydra.logger.base import Logger
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.run_dir import RunDirectory
from spd_hydra.sampler import Sampler
from spd_hydra.trainer import Trainer

VARIANTS = ("compiled", "eager", "plain")
GRAPHS = "graphs"
"""On a GPU also the compiled step replayed as CUDA graphs, whose kernels `compiled` launches one by one."""
REFERENCE = "plain in float64"
TOLERANCE = 1e-5
_SHIFT = 0.1  # of the initial weights, so that no bias is exactly zero when gradients are compared

Sample = tuple[Tensor, Tensor]
"""A batch and its random numbers."""

Numbers = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Case:
    """A preset, and the batch size where it is not the preset's own: `tms_5-2@4096`."""

    experiment: str
    batch_size: int | None = None

    @classmethod
    def read(cls, text: str) -> "Case":
        """The case that a text names.

        Raises:
            ValueError: what follows @ is no number.
        """
        experiment, _, size = text.partition("@")
        return cls(experiment, int(size) if size else None)

    def __str__(self) -> str:
        return self.experiment if self.batch_size is None else f"{self.experiment}@{self.batch_size}"

    def config(self, overrides: Sequence[str] = (), device: str = "cpu") -> RunConfig:
        """The preset, on a device: cpu, cuda or auto."""
        size = [] if self.batch_size is None else [f"train.batch_size={self.batch_size}"]
        return compose([f"experiment={self.experiment}", f"device={device}", *size, *overrides])


class Variant:
    """One way to take a training step.

    Args:
        step: draws data and random numbers, or takes the given ones; computes losses and gradients, which
            it leaves in the parameters; updates. Returns every term and `total`.
        parameters: what is trained, by name.
        device: where the step is taken.
        first_steps: how many of them are slower than all others.
    """

    def __init__(
        self,
        step: "_Step",
        parameters: Mapping[str, Tensor],
        device: torch.device,
        *,
        first_steps: int = 1,
    ) -> None:
        self.step = step
        self.device = device
        self.first_steps = first_steps
        self._parameters = parameters

    def losses_and_gradients(self, sample: Sample) -> tuple[Numbers, dict[str, Tensor]]:
        """Take a step on the given data: every term and `total`, and the gradient of `total` by parameter."""
        losses = self.step(sample)
        gradients = {name: p.grad.clone() for name, p in self._parameters.items() if p.grad is not None}
        return {name: value.item() for name, value in losses.items()}, gradients


class _Step(Protocol):
    def __call__(self, sample: Sample | None = None) -> Mapping[str, Tensor]: ...


def variants_on(device: torch.device) -> tuple[str, ...]:
    """What is compared on a device, the plain implementation last."""
    return (GRAPHS, *VARIANTS) if device.type == "cuda" else VARIANTS


def parts_of(config: RunConfig, *, compiled: bool, graphs: bool = False) -> Parts:
    """The decomposition of an untrained target, whose step costs what that of a trained one does."""
    train = dataclasses.replace(config.train, compile=compiled, cuda_graphs=graphs)
    config = dataclasses.replace(config, train=train)
    parts = assemble(config, untrained_target(config), device_of(config))
    generator = rng.generator(config.seed, "benchmark")
    with torch.no_grad():
        for parameter in parts.model.parameters():
            if parameter.requires_grad:
                shift = _SHIFT * torch.randn(parameter.shape, generator=generator)
                parameter.add_(shift.to(parameter.device))
    return parts


def make(name: str, config: RunConfig) -> Variant:
    """One of `VARIANTS`, `GRAPHS` or the `REFERENCE`, all with the same initial weights."""
    parts = parts_of(config, compiled=name in ("compiled", GRAPHS), graphs=name == GRAPHS)
    if name in ("plain", REFERENCE):
        plain = PlainStep(parts, torch.float64 if name == REFERENCE else torch.float32)
        return Variant(plain.step, plain.parameters, parts.model.device)
    trainer = _trainer(parts)
    sampler = trainer.sampler

    def step(sample: Sample | None = None) -> dict[str, Tensor]:
        if name != GRAPHS:  # they draw by themselves, first of all what `example` gives
            trainer.sampler = sampler if sample is None else cast(Sampler, lambda step: sample)
        loss = trainer.train_step()
        return {**loss.terms, "total": loss.total.detach()}

    parameters = {name: p for name, p in parts.model.named_parameters() if p.requires_grad}
    return Variant(step, parameters, parts.model.device, first_steps=REHEARSALS + 1 if name == GRAPHS else 1)


def trainer_of(config: RunConfig) -> Trainer:
    """A trainer for steps alone: it neither evaluates, logs nor saves."""
    return _trainer(parts_of(config, compiled=config.train.compile, graphs=config.train.cuda_graphs))


def _trainer(parts: Parts) -> Trainer:
    return Trainer(
        parts.objective,
        training=parts.config.train,
        evaluation=parts.config.eval,
        sampler=parts.train_sampler(),
        evaluate=_no_evaluation,
        on_figures=lambda evaluation: None,
        run=RunDirectory(Path()),  # never written to
        tracker=Logger(),
    )


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was given; a CPU always has."""
    torch.get_device_module(device).synchronize()


def example(config: RunConfig) -> Sample:
    """The batch and the draws of step 0, from the project's own sampler."""
    return parts_of(config, compiled=False).train_sampler()(0)


def differences(variant: Variant, reference: Variant, sample: Sample) -> tuple[Numbers, Numbers]:
    """Relative differences |a - b| / |b| of losses by term and ‖a - b‖ / ‖b‖ of gradients by parameter.

    Both take a step. What only one of the two has counts as infinitely different.
    """
    losses, gradients = variant.losses_and_gradients(sample)
    losses_wanted, gradients_wanted = reference.losses_and_gradients(sample)
    of_losses = {
        name: _relative(abs(losses[name] - losses_wanted[name]), abs(losses_wanted[name]))
        for name in losses.keys() & losses_wanted.keys()
    }
    of_gradients = {
        name: _relative(
            (gradients[name] - gradients_wanted[name]).norm().item(), gradients_wanted[name].norm().item()
        )
        for name in gradients.keys() & gradients_wanted.keys()
    }
    return (
        of_losses | dict.fromkeys(losses.keys() ^ losses_wanted.keys(), math.inf),
        of_gradients | dict.fromkeys(gradients.keys() ^ gradients_wanted.keys(), math.inf),
    )


def _relative(difference: float, size: float) -> float:
    if difference == 0:
        return 0.0
    return difference / size if size else math.inf


def _no_evaluation(step: int) -> Evaluation:
    raise AssertionError("the benchmark takes steps and never evaluates")
