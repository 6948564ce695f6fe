"""What a causal-importance function must offer."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra.factored import Activation
from spd_hydra.section import Section


class SiteShape(NamedTuple):
    """Width of a site's input and its number of subcomponents; `embedding` sites get tokens as input."""

    d_in: int
    C: int
    embedding: bool = False


class SiteActivation(NamedTuple):
    """What a site sees on the clean forward pass.

    `input` is x, `[..., d_in]` (token ids `[...]` at an embedding); `inner` is h = x V, `[..., C]`,
    with the gradient to V attached.
    """

    input: Activation
    inner: Float[Tensor, "*positions C"]


@dataclasses.dataclass(kw_only=True)
class CausalImportanceFn(Section):
    """The function that predicts, per position, how much each subcomponent is needed."""

    def build(self, sites: Mapping[str, SiteShape], generator: torch.Generator) -> nn.Module:
        """A module from `{site: SiteActivation}` to `{site: z}`, the pre-sigmoid values `[..., C]`.

        Its `forward(activations, valid=None)` takes as `valid` which positions are real, `[batch, length]`,
        true or false: the others are padding, which must not influence z at real positions. A function
        that reads each position by itself has nothing to do with it. None: all are real.

        Args:
            sites: shapes by site.
            generator: source of the initial weights.
        """
        raise NotImplementedError


def kaiming_normal(
    shape: tuple[int, ...], *, fan_in: float, gain: float, generator: torch.Generator
) -> nn.Parameter:
    """Weights drawn from N(0, gain² / fan_in)."""
    return nn.Parameter(torch.randn(shape, generator=generator) * (gain / fan_in**0.5))
