"""The rank-one pieces of one weight matrix: V: [d_in, C] reads, U: [C, d_out] writes."""

from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra.factored import Activation, dense
from spd_hydra.precision import exact_product


class Init(Enum):
    """How V and U start.

    `normal`: V ~ N(0, 1/d_in), U ~ N(0, 1/C). `aligned`: unit vectors, then U_c scaled by ⟨U_c V_c, W⟩.
    `inputs`: V along inputs of the site, U what sums to W (`input_init.start_from_inputs`, from `normal`).
    `detectors`: V that each read one direction of the inputs and of all else little, U what sums to W
    (`detector_init.start_as_detectors`, from `normal`).
    """

    normal = "normal"
    aligned = "aligned"
    inputs = "inputs"
    detectors = "detectors"


class Subcomponents(nn.Module):
    """`C` rank-one subcomponents `U_c V_c` of a matrix W: [d_out, d_in], with inner activation h = x V.

    Args:
        weight: W, only its shape is used unless `init` is `aligned`.
        C: number of subcomponents, also above the rank of W.
        init: how V and U start.
        generator: source of the initial values.
    """

    V: Float[Tensor, "d_in C"]
    U: Float[Tensor, "C d_out"]

    def __init__(
        self, weight: Float[Tensor, "d_out d_in"], C: int, init: Init, generator: torch.Generator
    ) -> None:
        super().__init__()
        d_out, d_in = weight.shape
        V = torch.randn(d_in, C, generator=generator)
        U = torch.randn(C, d_out, generator=generator)
        if init is not Init.aligned:
            V, U = V / d_in**0.5, U / C**0.5
        else:
            V, U = V / V.norm(dim=0), U / U.norm(dim=1, keepdim=True)
            U = U * torch.einsum("co,oi,ic->c", U, weight.detach().float().cpu(), V)[:, None]
        self.V = nn.Parameter(V)
        self.U = nn.Parameter(U)

    def extra_repr(self) -> str:
        return _sizes(self.V, self.U)

    @property
    def C(self) -> int:
        """Number of subcomponents."""
        return self.V.shape[1]


class TiedSubcomponents(nn.Module):
    """The subcomponents of the transposed matrix: V = U_sourceᵀ, U = V_sourceᵀ.

    They have no parameters of their own: a shared one gets one gradient and one optimiser slot.
    """

    def __init__(self, source: Subcomponents) -> None:
        super().__init__()
        self._source = (source,)  # in a tuple, so that the parameters are registered once, at the source

    def extra_repr(self) -> str:
        return _sizes(self.V, self.U)

    @property
    def V(self) -> Float[Tensor, "d_in C"]:
        """Reading vectors, the transpose of the source's U."""
        return self._source[0].U.T

    @property
    def U(self) -> Float[Tensor, "C d_out"]:
        """Writing vectors, the transpose of the source's V."""
        return self._source[0].V.T

    @property
    def C(self) -> int:
        """Number of subcomponents."""
        return self._source[0].C


def _sizes(V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]) -> str:
    return f"C={V.shape[1]}, d_in={V.shape[0]}, d_out={U.shape[1]}"


def inner_activation(
    x: Activation,
    V: Float[Tensor, "d_in C"],
    embedding: bool,
) -> Float[Tensor, "*positions C"]:
    """h = x V of vectors `[..., d_in]`, or the rows of V at the given tokens `[...]`."""
    return nn.functional.embedding(dense(x), V) if embedding else x @ V


def weight_delta(
    weight: Float[Tensor, "d_out d_in"], V: Float[Tensor, "d_in C"], U: Float[Tensor, "C d_out"]
) -> Float[Tensor, "d_out d_in"]:
    """Δ = W - (V U)ᵀ, the part of the matrix that the subcomponents do not sum to."""
    return weight - exact_product(V, U).T
