"""The fused private MLPs against a plain float64 implementation, and what they keep for the backward pass."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import gelu

from spd_hydra.ci_fn.private_gelu import private_gelu_mlp
from spd_hydra.compiling import Kernel

BATCH, C, HIDDEN = 37, 5, 7


def plain(h: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
    """z[b, c] = Σ_j w_out[c, j] · gelu(w_in[c, j]·h[b, c] + b_in[c, j])."""
    return (gelu(h[..., None] * w_in + b_in) * w_out).sum(-1)


def arguments(
    *positions: int, spread: float = 1.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(*positions, C), (C, HIDDEN), (C, HIDDEN), (C, HIDDEN)]
    h, w_in, b_in, w_out = (
        (spread * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for shape in shapes
    )
    return h, w_in, b_in, w_out


@pytest.mark.parametrize("positions", [(1,), (BATCH,), (3, 4), (2, 3, 2), (256,), (3, 200)])
@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_value_and_all_gradients_are_those_of_the_exact_gelu(
    positions: tuple[int, ...], spread: float
) -> None:
    inputs = arguments(*positions, spread=spread)
    incoming = torch.randn(*positions, C, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = private_gelu_mlp(*inputs), plain(*inputs)
    scale = max(1.0, spread**3) * HIDDEN
    torch.testing.assert_close(found, expected, atol=2e-7 * scale, rtol=1e-6)
    found_gradients = torch.autograd.grad(found, inputs, incoming)
    expected_gradients = torch.autograd.grad(expected, inputs, incoming)
    for name, own, other in zip(
        ("h", "w_in", "b_in", "w_out"), found_gradients, expected_gradients, strict=True
    ):
        size = other.abs().max().item()
        assert (own - other).abs().max().item() <= 3e-6 * max(size, scale), name


def test_float32_is_as_exact_as_float32_can_be() -> None:
    single = arguments(200, dtype=torch.float32)
    double = tuple(tensor.detach().double() for tensor in single)
    error = (private_gelu_mlp(*single).double() - plain(*double)).abs().max()
    assert error < 1e-5


def test_gradients_of_the_weights_keep_their_digits_over_thousands_of_positions() -> None:
    single = arguments(5000, dtype=torch.float32)
    double = tuple(tensor.detach().double().requires_grad_() for tensor in single)
    incoming = torch.linspace(-1, 1, 5000)[:, None] + torch.linspace(0, 0.1, C)
    found = torch.autograd.grad(private_gelu_mlp(*single), single, incoming)
    expected = torch.autograd.grad(plain(*double), double, incoming.double())
    for own, other in zip(found[1:], expected[1:], strict=True):
        assert ((own - other).norm() / other.norm()).item() < 2e-6


def test_far_tails_give_zero_and_the_identity() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    for far in (10.0, 40.0, 1e4):
        h = torch.tensor([[-far], [far]], dtype=torch.float64, requires_grad=True)
        z = private_gelu_mlp(h, one, 0 * one, one)
        (gradient,) = torch.autograd.grad(z.sum(), h)
        assert z.flatten().tolist() == pytest.approx([0.0, far], abs=1e-9)
        assert gradient.flatten().tolist() == pytest.approx([0.0, 1.0], abs=1e-9)


def test_no_hidden_activation_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        private_gelu_mlp(*arguments(BATCH))
    assert kept
    assert max(kept) <= BATCH * C


def test_only_wanted_gradients_are_needed() -> None:
    h, w_in, b_in, w_out = arguments(BATCH)
    z = private_gelu_mlp(h.detach(), w_in, b_in.detach(), w_out)
    torch.autograd.backward(z.sum())
    assert h.grad is None
    assert w_in.grad is not None
    assert b_in.grad is None


def test_a_half_precision_input_gives_float32_values_and_a_half_precision_gradient() -> None:
    _, *weights = arguments(BATCH, dtype=torch.float32)
    h = torch.linspace(-2, 2, BATCH * C).reshape(BATCH, C).bfloat16().requires_grad_()
    z = private_gelu_mlp(h, *weights)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, plain(h.detach().float(), *weights), atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(z.sum(), h)
    assert gradient.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_half_precision_input_gives_the_same_values_in_a_compiled_step() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(8, 6, generator=generator).bfloat16()
    weights = [torch.randn(6, 16, generator=generator) for _ in range(3)]

    def twice(h: Tensor, *weights: Tensor) -> Tensor:
        return 2 * private_gelu_mlp(h, *weights)

    torch.testing.assert_close(Kernel(twice)(h, *weights), twice(h, *weights), atol=1e-2, rtol=1e-3)


def test_the_compiler_is_told_the_precision_of_the_values() -> None:
    _, *weights = arguments(BATCH, dtype=torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True):
        h = torch.empty(BATCH, C, dtype=torch.bfloat16)
        found = torch.ops.spd_hydra.private_gelu_values(h, *weights)
    assert [own.dtype for own in found] == [torch.float32, torch.float32]


def test_a_replica_axis_can_be_mapped_over() -> None:
    replicas = [torch.stack([a, 0.5 * a]).detach().requires_grad_() for a in arguments(BATCH)]
    mapped = torch.vmap(private_gelu_mlp)(*replicas)
    alone = torch.stack([private_gelu_mlp(*(a[i] for a in replicas)) for i in range(2)])
    torch.testing.assert_close(mapped, alone)
    for own, other in zip(
        torch.autograd.grad(mapped.square().sum(), replicas),
        torch.autograd.grad(alone.square().sum(), replicas),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


def test_functional_gradients_agree_with_autograd() -> None:
    h, w_in, b_in, w_out = arguments(BATCH)
    functional = torch.func.grad(lambda w: private_gelu_mlp(h, w, b_in, w_out).square().sum())(w_in)
    (expected,) = torch.autograd.grad(private_gelu_mlp(h, w_in, b_in, w_out).square().sum(), w_in)
    torch.testing.assert_close(functional, expected)
