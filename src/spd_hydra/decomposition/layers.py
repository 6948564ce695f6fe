"""Which layers can be decomposed, and how each one's weight reads as a matrix W: [d_out, d_in]."""

from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra.model.transposed import TransposedLinear


def is_embedding(layer: nn.Module) -> bool:
    """Whether the layer looks rows up by token id."""
    return isinstance(layer, nn.Embedding)


def is_decomposable(layer: nn.Module) -> bool:
    """Whether the layer is `y = x Wᵀ + b` or a lookup: Linear, Embedding, Conv1D or a tied transpose."""
    return isinstance(layer, nn.Linear | nn.Embedding | TransposedLinear) or _is_conv1d(layer)


def weight_matrix(layer: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """W of a decomposable layer. For an embedding, d_in is the number of tokens (one-hot input)."""
    weight = layer.weight
    assert isinstance(weight, Tensor), f"{type(layer).__name__} has no weight tensor"
    return weight.T if is_embedding(layer) or _is_conv1d(layer) else weight


def bias_vector(layer: nn.Module) -> Float[Tensor, " d_out"] | None:
    """b of a decomposable layer, or None."""
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _is_conv1d(layer: nn.Module) -> bool:
    # By name: importing transformers costs two seconds that a toy run should not pay.
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.")
        for base in type(layer).__mro__
    )
