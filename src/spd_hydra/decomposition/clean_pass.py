"""What one pass of the target as it is leaves for the masked passes of the same batch."""

from typing import NamedTuple

from torch import Tensor

from spd_hydra.ci_fn.base import SiteActivation
from spd_hydra.decomposition.blocks import CleanBlocks
from spd_hydra.factored import Activation, Products


class CleanPass(NamedTuple):
    """The target's output for a batch, and each site's input, each site's and block's output on the way."""

    output: Tensor
    inputs: dict[str, Activation]
    outputs: dict[str, Activation]
    blocks: CleanBlocks
    is_hooked: bool = False


class Reuse(NamedTuple):
    """What the masked passes of one batch share: the clean pass, and products of parameters."""

    clean: CleanPass
    activations: dict[str, SiteActivation]
    products: Products
