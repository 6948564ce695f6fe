"""Weights for modules that are made by hand."""

import torch
from torch import nn

from spd_hydra import rng


def draw_weights(module: nn.Module) -> None:
    """Give all parameters values from N(0, 1), the same in every call."""
    generator = rng.generator(0, "stack")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
