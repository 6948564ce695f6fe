"""One private one-input MLP per subcomponent, as a single pass that keeps no hidden activations.

z[b, c] = Σ_j w_out[c, j] · gelu(w_in[c, j] · h[b, c] + b_in[c, j])

A plain implementation stores the `[batch, C, hidden]` tensor twice for its backward pass, and at toy
sizes that tensor is most of the memory and most of the time of a training step. Because each MLP has a
single input, dz/dh is one more number per (b, c): it is made in the forward pass beside z, from the
same exponential, and the backward pass recomputes the hidden layer once, for the weights.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from spd_hydra.compiling import Kernel, is_tracing

# Uncompiled, of each `[rows, C, hidden]` tensor: what a CPU's cache holds; on a GPU, where each block is a
# dozen launches, 64 MiB.
_NUMBERS_AT_ONCE, _NUMBERS_AT_ONCE_ON_GPUS = 2**17, 2**24
_RECIPROCAL_SQRT_2PI = 1 / math.sqrt(2 * math.pi)


def private_gelu_mlp(
    h: Float[Tensor, "*positions C"],
    w_in: Float[Tensor, "C hidden"],
    b_in: Float[Tensor, "C hidden"],
    w_out: Float[Tensor, "C hidden"],
) -> Float[Tensor, "*positions C"]:
    """Output of every subcomponent's private MLP, without its output bias."""
    z: Tensor = _PrivateGeluMLP.apply(h, w_in, b_in, w_out)[0]  # type: ignore[no-untyped-call]
    return z


class _PrivateGeluMLP(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(h: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
        values = _values_kernel if is_tracing() else _values_by_block
        return values(h, w_in, b_in, w_out)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h, w_in, b_in, w_out, dz_dh = ctx.saved_tensors
        gradients = _weight_gradients_kernel if is_tracing() else _weight_gradients_by_block
        grad_w_in, grad_b_in, grad_w_out = gradients(h, grad_z, w_in, b_in, w_out)
        return grad_z * dz_dh, grad_w_in, grad_b_in, grad_w_out


def _values(h: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    """z without its bias, and dz/dh: sums over the hidden units."""
    pre = h[..., None] * w_in + b_in
    cdf, pdf = _normal_cdf_pdf(pre)
    return (w_out * pre * cdf).sum(-1), (w_out * w_in * (cdf + pre * pdf)).sum(-1)


def _weight_gradients(
    h: Tensor, grad_z: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of w_in, b_in and w_out: sums over positions of `[C, hidden]` terms."""
    # Batch last: the sums then run along contiguous memory.
    h_last = h.flatten(0, -2).T.contiguous()[:, None, :]
    g_last = grad_z.flatten(0, -2).T.contiguous()[:, None, :]
    pre = h_last * w_in[..., None] + b_in[..., None]
    cdf, pdf = _normal_cdf_pdf(pre)
    grad_pre = g_last * w_out[..., None] * (cdf + pre * pdf)
    return (grad_pre * h_last).sum(-1), grad_pre.sum(-1), (g_last * pre * cdf).sum(-1)


def _values_by_block(h: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    blocks = [_values(block, w_in, b_in, w_out) for block in _blocks(h, w_in)]
    z, dz_dh = (torch.cat(parts).view(h.shape) for parts in zip(*blocks, strict=True))
    return z, dz_dh


def _weight_gradients_by_block(
    h: Tensor, grad_z: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    parts = [
        _weight_gradients(h_block, g_block, w_in, b_in, w_out)
        for h_block, g_block in zip(_blocks(h, w_in), _blocks(grad_z, w_in), strict=True)
    ]
    grad_w_in, grad_b_in, grad_w_out = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return grad_w_in, grad_b_in, grad_w_out


def _blocks(x: Float[Tensor, "*positions C"], w_in: Tensor) -> tuple[Tensor, ...]:
    """Rows of positions, so many that their `[rows, C, hidden]` tensors stay small."""
    numbers = _NUMBERS_AT_ONCE if x.device.type == "cpu" else _NUMBERS_AT_ONCE_ON_GPUS
    return torch.split(x.flatten(0, -2), max(1, numbers // w_in.numel()))


# Inside a compiled step both passes are kernels of their own. Left to itself, the compiler computes dz/dh
# a second time in the backward pass, and writes the `[C, hidden, batch]` terms of the gradients to memory
# to read them again three times over.

# Positions that a compiled kernel adds up one after another. The terms nearly cancel, so the rounding of one
# long float32 sum would show in the fifth digit. (Written as a sum of sums inside the kernel, the compiler
# would write the `[C, hidden, batch]` terms to memory.)
_BLOCK = 512

_values_compiled = Kernel(_values, keep_in_registers=True)
_weight_gradients_compiled = Kernel(_weight_gradients, keep_in_registers=True)


@torch.library.custom_op("spd_hydra::private_gelu_values", mutates_args=())
def _values_kernel(h: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    values: tuple[Tensor, Tensor] = _values_compiled(h, w_in, b_in, w_out)
    return values


@_values_kernel.register_fake
def _(h: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor]:
    kind = torch.promote_types(h.dtype, w_in.dtype)  # under autocast h alone is bfloat16
    return h.new_empty(h.shape, dtype=kind), h.new_empty(h.shape, dtype=kind)


@torch.library.custom_op("spd_hydra::private_gelu_weight_gradients", mutates_args=())
def _weight_gradients_kernel(
    h: Tensor, grad_z: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    h_blocks, g_blocks = (torch.split(tensor.flatten(0, -2), _BLOCK) for tensor in (h, grad_z))
    parts = [
        _weight_gradients_compiled(h_block, g_block, w_in, b_in, w_out)
        for h_block, g_block in zip(h_blocks, g_blocks, strict=True)
    ]
    if len(parts) == 1:
        gradients: tuple[Tensor, Tensor, Tensor] = parts[0]
        return gradients
    grad_w_in, grad_b_in, grad_w_out = (torch.stack(part).sum(0) for part in zip(*parts, strict=True))
    return grad_w_in, grad_b_in, grad_w_out


@_weight_gradients_kernel.register_fake
def _(h: Tensor, grad_z: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(w_in), torch.empty_like(b_in), torch.empty_like(w_out)


def _with_replicas(tensor: Tensor, dim: int | None, replicas: int) -> Tensor:
    """The replica axis in front, also where all replicas share a tensor."""
    return tensor.expand(replicas, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


# Under vmap the replicas are further subcomponents of one call: `[replicas, *positions, C]` becomes
# `[*positions, replicas · C]`.


def _merged(
    info: Any, in_dims: tuple[int | None, ...], positional: tuple[Tensor, ...], weights: tuple[Tensor, ...]
) -> list[Tensor]:
    tensors = [
        _with_replicas(tensor, dim, info.batch_size)
        for tensor, dim in zip((*positional, *weights), in_dims, strict=True)
    ]
    n = len(positional)
    merged = [tensor.movedim(0, -2).flatten(-2).contiguous() for tensor in tensors[:n]]
    return merged + [tensor.flatten(0, 1).contiguous() for tensor in tensors[n:]]


@_values_kernel.register_vmap
def _(
    info: Any, in_dims: tuple[int | None, ...], h: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    z, dz_dh = _values_kernel(*_merged(info, in_dims, (h,), (w_in, b_in, w_out)))
    split = (info.batch_size, -1)
    return (z.unflatten(-1, split).movedim(-2, 0), dz_dh.unflatten(-1, split).movedim(-2, 0)), (0, 0)


@_weight_gradients_kernel.register_vmap
def _(
    info: Any,
    in_dims: tuple[int | None, ...],
    h: Tensor,
    grad_z: Tensor,
    w_in: Tensor,
    b_in: Tensor,
    w_out: Tensor,
) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
    gradients = _weight_gradients_kernel(*_merged(info, in_dims, (h, grad_z), (w_in, b_in, w_out)))
    return tuple(gradient.unflatten(0, (info.batch_size, -1)) for gradient in gradients), (0, 0, 0)


def _normal_cdf_pdf(x: Tensor) -> tuple[Tensor, Tensor]:
    """Distribution and density function of N(0, 1); absolute error of the former ≤ 3e-7 in float32.

    Abramowitz & Stegun 7.1.26 writes erf with exp(-x²/2), which the density needs anyway: one
    exponential serves both, where gelu and its derivative would take three.
    """
    bell = torch.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + (0.3275911 / math.sqrt(2)) * x.abs())
    polynomial = 0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429)))
    tail = 0.5 * polynomial * t * bell
    return torch.where(x < 0, tail, 1.0 - tail), bell * _RECIPROCAL_SQRT_2PI
