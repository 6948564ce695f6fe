"""A linear layer that borrows the transpose of another layer's weights."""

from jaxtyping import Float
from torch import Tensor, nn


class TransposedLinear(nn.Module):
    """y = x Wᵀ + b where W is the transpose of a parameter that another layer owns.

    The shared parameter is registered here too, as the same object: `named_parameters()` lists it
    once (under its owner), and copies or device moves of the whole model keep the tie.

    Args:
        shared: the owner's weight, `[d_in, d_out]` of this layer.
        bias: trained with the model, or None.
    """

    bias: Float[nn.Parameter, " d_out"] | None

    def __init__(self, shared: nn.Parameter, bias: Float[nn.Parameter, " d_out"] | None = None) -> None:
        super().__init__()
        self.shared = shared
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        """The weight matrix, laid out as in `nn.Linear`; a view of the shared parameter."""
        return self.shared.T

    def forward(self, x: Float[Tensor, "*positions d_in"]) -> Float[Tensor, "*positions d_out"]:
        """x Wᵀ + b."""
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shape, as `nn.Linear` prints it."""
        d_in, d_out = self.shared.shape
        return f"in_features={d_in}, out_features={d_out}, bias={self.bias is not None}"
