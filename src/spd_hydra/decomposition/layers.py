"""Which layers can be decomposed, and how each one's weight reads as a matrix W: [d_out, d_in]."""

from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra.factored import WritingLinear
from spd_hydra.model.transposed import TransposedLinear


def is_embedding(layer: nn.Module) -> bool:
    """Whether the layer looks rows up by token id."""
    return isinstance(layer, nn.Embedding)


def is_decomposable(layer: nn.Module) -> bool:
    """Whether the layer is `y = x Wᵀ + b` or a lookup: Linear, Embedding, Conv1D or a tied transpose."""
    return _kind(layer) is not None and not computes_otherwise(layer)


def computes_otherwise(layer: nn.Module) -> bool:
    """Whether the layer is of such a kind, but gives something else than the product.

    By a `forward` of its own, e.g. one that scales its rows, by hooks, or, as an embedding with `max_norm`,
    by changing its weight on the way.
    """
    kind = _kind(layer)
    return kind is not None and (
        not (type(layer).forward is kind.forward or _is_plain(layer))
        or "forward" in vars(layer)
        or bool(layer._forward_hooks or layer._forward_pre_hooks)
        or getattr(layer, "max_norm", None) is not None
    )


def weight_matrix(layer: nn.Module) -> Float[Tensor, "d_out d_in"]:
    """W of a decomposable layer. For an embedding, d_in is the number of tokens (one-hot input)."""
    weight = layer.weight
    assert isinstance(weight, Tensor), f"{type(layer).__name__} has no weight tensor"
    return weight.T if is_embedding(layer) or _is_conv1d(layer) else weight


def bias_vector(layer: nn.Module) -> Float[Tensor, " d_out"] | None:
    """b of a decomposable layer, or None."""
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _kind(layer: nn.Module) -> type[nn.Module] | None:
    """The class whose `forward` the layer should have."""
    known = (WritingLinear, nn.Linear, nn.Embedding, TransposedLinear)  # the first is also of the second
    return next((kind for kind in known if isinstance(layer, kind)), _conv1d(layer))


def _is_plain(layer: nn.Module) -> bool:
    """Whether it is a layer of transformers that writes the product of a Linear down in its own words."""
    kind = type(layer)
    return kind.__name__ == "FalconLinear" and kind.__module__.startswith("transformers.")


def _is_conv1d(layer: nn.Module) -> bool:
    return _conv1d(layer) is not None


def _conv1d(layer: nn.Module) -> type[nn.Module] | None:
    # By name: importing transformers costs two seconds that a toy run should not pay.
    return next(
        (
            base
            for base in type(layer).__mro__
            if base.__name__ == "Conv1D" and base.__module__.startswith("transformers.")
        ),
        None,
    )
