"""Wide vectors kept as products, so that what reads them never needs the wide vector itself.

A residual stream r = Σ_i c_i B_i is written by narrow vectors c_i (features, neurons, inner activations)
through matrices B_i, and read through further matrices M: r M = Σ_i c_i (B_i M). With a stream much wider
than its writers, or than the batch is long, the products B_i M of a whole batch cost less than r alone. They
depend on parameters only, so the masked passes of one batch share them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Matrix(NamedTuple):
    """A parameter, or its transpose: the parameter itself is what products are remembered by."""

    tensor: Tensor
    transposed: bool = False

    @property
    def value(self) -> Tensor:
        """The matrix as one."""
        return self.tensor.T if self.transposed else self.tensor


Products = dict[tuple[int, bool, int, bool], tuple[Tensor, Tensor, Tensor]]
"""Products of two matrices, with the factors, whose identity must not pass to others."""

_products: ContextVar[Products | None] = ContextVar("products", default=None)


@contextmanager
def sharing(products: Products | None) -> Iterator[None]:
    """Compute the product of the same two matrices once; for passes between two updates of the parameters."""
    token = _products.set(products)
    try:
        yield
    finally:
        _products.reset(token)


class Factored:
    """x = Σ_i c_i B_i, `[*positions, d]`, with c_i: `[*positions, k_i]` and B_i: `[k_i, d]`, never formed.

    It can be added to, scaled per position, and read by matrices (`x @ M`, `nn.Linear`). `dense` forms it.

    Args:
        terms: pairs (c_i, B_i); None for B_i is the identity.
    """

    def __init__(self, terms: tuple[tuple[Tensor, Matrix | None], ...]) -> None:
        self.terms = terms

    def __matmul__(self, matrix: Tensor) -> Tensor:
        return self._read(Matrix(matrix))

    def __add__(self, other: "Factored | Tensor") -> "Factored":
        return Factored(self.terms + (other.terms if isinstance(other, Factored) else ((other, None),)))

    __radd__ = __add__

    def scaled(self, factor: Float[Tensor, "*positions"] | Bool[Tensor, "*positions"]) -> "Factored":
        """x times one number per position."""
        return Factored(tuple((c * factor[..., None], basis) for c, basis in self.terms))

    def dense(self) -> Float[Tensor, "*positions d"]:
        """The vector itself."""
        return _sum([c if basis is None else c @ basis.value for c, basis in self.terms])

    def _read(self, matrix: Matrix) -> Tensor:
        return _sum(
            [c @ (matrix.value if basis is None else _product(basis, matrix)) for c, basis in self.terms]
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What `nn.Linear` and `tensor + x` come to."""
        if func is nn.functional.linear:
            return _linear(*args, **(kwargs or {}))
        if func in (Tensor.add, Tensor.__add__, torch.add) and len(args) == 2 and not kwargs:
            tensor, x = args
            return x + tensor
        return NotImplemented


def _linear(input: Factored, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = input._read(Matrix(weight, transposed=True))
    return y if bias is None else y + bias


def _sum(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


Activation = Tensor | Factored
"""What flows between the layers of a target."""


def dense(x: Activation) -> Tensor:
    """The tensor, formed if it was kept as products."""
    return x.dense() if isinstance(x, Factored) else x


def selected(where: Bool[Tensor, "*positions"], x: Activation, otherwise: Activation) -> Activation:
    """x at the positions where `where` holds, the other elsewhere."""
    if isinstance(x, Factored) and isinstance(otherwise, Factored):
        return x.scaled(where) + otherwise.scaled(~where)
    return torch.where(where[..., None], dense(x), dense(otherwise))


def _product(left: Matrix, right: Matrix) -> Tensor:
    known = _products.get()
    if known is None:
        return left.value @ right.value
    key = (id(left.tensor), left.transposed, id(right.tensor), right.transposed)
    if key not in known:
        known[key] = (left.value @ right.value, left.tensor, right.tensor)
    return known[key][0]


class KeepsFactors(nn.Module):
    """A part of a target that can give its output as products; it does so in the copy that is masked only."""

    factored = False

    def written(self, x: Tensor, matrix: Float[Tensor, "k d"], *, transposed: bool = False) -> Activation:
        """x M, or x Mᵀ: as a product where products are kept."""
        basis = Matrix(matrix, transposed)
        return Factored(((x, basis),)) if self.factored else x @ basis.value


class WritingLinear(nn.Linear, KeepsFactors):
    """An `nn.Linear` without bias that writes into a stream: its output x Wᵀ may be kept as a product."""

    def forward(self, input: Tensor) -> Tensor:
        """x Wᵀ."""
        assert getattr(self, "bias", None) is None, "a writing layer has no bias"
        return cast(Tensor, self.written(input, self.weight, transposed=True))


def keep_factors(copy: nn.Module) -> None:
    """Let all parts of a target that can keep their outputs as products do so."""
    for module in copy.modules():
        if isinstance(module, KeepsFactors):
            module.factored = True


def write(x: Tensor, matrix: Float[Tensor, "k d"], layer: nn.Module) -> Activation:
    """x M in place of this layer's output: as a product if the layer keeps its own as one."""
    return layer.written(x, matrix) if isinstance(layer, KeepsFactors) else x @ matrix
