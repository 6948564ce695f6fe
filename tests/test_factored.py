"""Wide vectors kept as products: every operation is that of the vector, formed by hand."""

import pytest
import torch
from torch import Tensor, nn

from spd_hydra.factored import (
    Factored,
    Matrix,
    Products,
    WritingLinear,
    dense,
    keep_factors,
    selected,
    sharing,
    write,
)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


C1, B1, C2, B2 = draw(4, 2, seed=1), draw(2, 7, seed=2), draw(4, 3, seed=3), draw(7, 3, seed=4)
PLAIN = draw(4, 7, seed=5)
KEPT = Factored(((C1, Matrix(B1)), (C2, Matrix(B2, transposed=True)), (PLAIN, None)))
FORMED = C1 @ B1 + C2 @ B2.T + PLAIN


def test_dense_forms_the_sum_of_products() -> None:
    torch.testing.assert_close(KEPT.dense(), FORMED)
    assert dense(PLAIN) is PLAIN


@pytest.mark.parametrize("products", [None, {}])
def test_reading_by_a_matrix_is_reading_the_formed_vector(products: Products | None) -> None:
    matrix, layer = draw(7, 5, seed=6), nn.Linear(7, 6)
    with sharing(products):
        torch.testing.assert_close(KEPT @ matrix, FORMED @ matrix)
        torch.testing.assert_close(layer(KEPT), layer(FORMED))


def test_sums_with_tensors_on_either_side() -> None:
    torch.testing.assert_close(dense(KEPT + KEPT), 2 * FORMED)
    torch.testing.assert_close(dense(KEPT + PLAIN), FORMED + PLAIN)
    torch.testing.assert_close(dense(PLAIN + KEPT), FORMED + PLAIN)


def test_arguments_by_name_and_further_ones_are_heeded() -> None:
    matrix, bias = draw(5, 7, seed=10), draw(5, seed=11)
    linear = nn.functional.linear(weight=matrix, bias=bias, input=KEPT)
    torch.testing.assert_close(linear, FORMED @ matrix.T + bias)
    with pytest.raises(TypeError):
        torch.add(PLAIN, KEPT, alpha=2)  # type: ignore[call-overload]
    torch.testing.assert_close((KEPT + bias.new_ones(7)).dense(), FORMED + 1)


def test_scaling_and_choosing_by_position() -> None:
    factor, where = draw(4, seed=7), torch.tensor([True, False, False, True])
    torch.testing.assert_close(KEPT.scaled(factor).dense(), factor[:, None] * FORMED)
    other = Factored(((C1, Matrix(B1)),))
    chosen = torch.where(where[:, None], FORMED, C1 @ B1)
    torch.testing.assert_close(dense(selected(where, KEPT, other)), chosen)
    torch.testing.assert_close(selected(where, FORMED, C1 @ B1), chosen)


def test_passes_share_products_and_their_gradients_add_up() -> None:
    basis, matrix = B1.clone().requires_grad_(), draw(7, 5, seed=8)
    products: Products = {}
    with sharing(products):
        y = Factored(((C1, Matrix(basis)),)) @ matrix + Factored(((2 * C1, Matrix(basis)),)) @ matrix
    assert len(products) == 1
    y.sum().backward()
    expected = (3 * C1).T @ torch.ones(4, 5) @ matrix.T
    torch.testing.assert_close(basis.grad, expected)


def test_a_product_of_other_factors_is_never_taken_for_a_remembered_one() -> None:
    products: Products = {}
    with sharing(products):
        for number in range(50):  # freed tensors give their identity to later ones
            basis = torch.full((2, 7), float(number))
            torch.testing.assert_close(Factored(((C1, Matrix(basis)),)) @ B2, C1 @ basis @ B2)


def test_a_layer_keeps_products_only_when_it_is_told_to() -> None:
    layer, plain = WritingLinear(3, 7, bias=False), nn.Linear(3, 7, bias=False)
    assert isinstance(layer(C2), Tensor)
    assert isinstance(write(C2, draw(3, 7, seed=9), layer), Tensor)
    formed = layer(C2)
    keep_factors(nn.Sequential(layer, plain))
    kept = layer(C2)
    assert isinstance(kept, Factored)
    torch.testing.assert_close(kept.dense(), formed)
    written = write(C2, draw(3, 7, seed=9), layer)
    assert isinstance(written, Factored)
    torch.testing.assert_close(written.dense(), C2 @ draw(3, 7, seed=9))
    assert isinstance(write(C2, draw(3, 7, seed=9), plain), Tensor)
