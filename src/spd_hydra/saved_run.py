"""What a run directory holds, as objects again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from spd_hydra.build import untrained_target
from spd_hydra.config import RunConfig
from spd_hydra.model.base import Measurement
from spd_hydra.model.obtain import TrainedTarget
from spd_hydra.model.weights import load_target_weights, save_target

TARGET_FILE = "target.safetensors"


def target_facts(target: TrainedTarget) -> dict[str, Any]:
    """What a summary says of the target."""
    return {
        "certified": target.certified,
        "seed": target.seed,
        "tries": target.tries,
        "loss": target.loss,
        "cached": target.cached,
        "measurements": [dataclasses.asdict(measurement) for measurement in target.measurements],
    }


def write_target(target: TrainedTarget, directory: Path) -> None:
    """Keep the target in the run directory, so that the run can be opened without the cache."""
    save_target(target.module, directory / TARGET_FILE, {"facts": json.dumps(target_facts(target))})


def read_target(config: RunConfig, directory: Path, device: torch.device) -> TrainedTarget:
    """The target that `write_target` kept, frozen and in evaluation mode.

    Raises:
        FileNotFoundError: the run was stopped before it had a target.
        WeightsError: the file is damaged.
    """
    module = untrained_target(config)
    facts = json.loads(load_target_weights(module, directory / TARGET_FILE)["facts"])
    measurements = [Measurement(**measurement) for measurement in facts.pop("measurements")]
    module = module.to(device).eval().requires_grad_(False)
    return TrainedTarget(module=module, measurements=measurements, seconds=0.0, **facts)
