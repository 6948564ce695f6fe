"""Whether a training can go on: its loss, gradients, weights and measurements are numbers."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from spd_hydra.loss.objective import StepLoss
from spd_hydra.precision import Precision
from spd_hydra.trainer_config import Training


class TrainingError(RuntimeError):
    """Training cannot go on; the message says at which step, why, and what to try."""


def require_finite(loss: StepLoss, gradient_norms: Mapping[str, Tensor], *, step: int, advice: str) -> None:
    """Check the loss of a step, and norms of its gradients as far as they were taken. Waits for the device.

    Raises:
        TrainingError: one is not finite; with advice.
    """
    total = loss.total.item()
    if not math.isfinite(total):
        bad = [name for name, value in loss.terms.items() if not math.isfinite(value.item())]
        what = f"the loss is {total} at step {step}, in: {', '.join(bad) or 'their sum'}"
    else:
        bad = [part for part, norm in gradient_norms.items() if not math.isfinite(norm.item())]
        if not bad:
            return
        what = f"the gradient is not finite at step {step}, in: {', '.join(bad)}"
    raise TrainingError(f"{what}. {advice}")


def require_finite_weights(weights: Iterable[Tensor], *, step: int, advice: str) -> None:
    """Check trained weights before they are measured or saved. Waits for the device.

    Raises:
        TrainingError: one is not finite; with advice.
    """
    if not torch.stack([weight.isfinite().all() for weight in weights]).all():
        raise TrainingError(f"the weights are not finite after step {step}. {advice}")


def require_finite_evaluation(metrics: Mapping[str, float], *, step: int, advice: str) -> None:
    """Check the total loss on held-out data, which can be the first to overflow.

    Raises:
        TrainingError: it is not finite; with advice.
    """
    total = metrics["loss/total"]
    if not math.isfinite(total):
        raise TrainingError(f"the loss on held-out data is {total} after step {step}. {advice}")


def what_to_try(training: Training, checkpoints: Path) -> str:
    """What to try where the numbers of a training stopped being finite."""
    precision = "" if training.precision is Precision.fp32 else ", or train.precision=fp32"
    return (
        f"Checkpoints in {checkpoints}, if there are any, are from before. Try a lower train.lr (now "
        f"{training.lr:g}) or train.clip_components=0.1{precision}"
    )
