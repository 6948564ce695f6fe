"""`global_transformer`: a transformer over positions, from the inputs of all sites to all subcomponents."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from spd_hydra.ci_fn.base import CausalImportanceFn, SiteActivation, SiteShape
from spd_hydra.ci_fn.layers import ConcatenatedInputs, gelu_mlp, linear
from spd_hydra.factored import dense
from spd_hydra.section import Problem, option, register

_FIRST_BIAS = 0.1  # standard deviation at the start


@register("ci_fn", "global_transformer")
@dataclasses.dataclass(kw_only=True)
class GlobalTransformerCausalImportance(CausalImportanceFn):
    """z of all sites from a transformer that sees their inputs at all positions (VPD, 2026).

    The input of each site, divided by its root mean square, all of them concatenated; a linear layer to
    `d_model`; `n_layers` blocks r += attention(norm(r)), r += MLP(norm(r)), with attention in both
    directions; a linear layer to Σ C, split by site. Norms are without weights, attention without biases.
    """

    d_model: int = option(256, "width of the residual stream", ge=1)
    n_heads: int = option(4, "attention heads of width d_model / n_heads", ge=1)
    n_layers: int = option(4, "number of blocks", ge=1)
    d_mlp: int = option(1024, "width of each block's hidden layer", ge=1)
    rope_base: float = option(
        10_000.0, "base of the rotary position embedding, in positions: larger tells longer distances", gt=1
    )

    def problems(self) -> Iterator[Problem]:
        out_of_range = list(super().problems())
        yield from out_of_range
        if not out_of_range and self.d_model % (2 * self.n_heads):
            yield Problem(
                "d_model",
                f"got {self.d_model}, must be a multiple of 2 x n_heads = {2 * self.n_heads}: every head is "
                "rotated in pairs of coordinates",
            )

    def build(self, sites: Mapping[str, SiteShape], generator: torch.Generator) -> nn.Module:
        return _GlobalTransformer(sites, self, generator)


class _GlobalTransformer(nn.Module):
    def __init__(
        self,
        sites: Mapping[str, SiteShape],
        options: GlobalTransformerCausalImportance,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.sites = dict(sites)
        self.d_head, self.rope_base = options.d_model // options.n_heads, options.rope_base
        self.first = ConcatenatedInputs(sites, options.d_model, gain=1.0, generator=generator)
        self.blocks = nn.ModuleList(_Block(options, generator) for _ in range(options.n_layers))
        n_out = sum(shape.C for shape in sites.values())
        self.last = linear(options.d_model, n_out, gain=1.0, generator=generator)
        # From inputs of zero, of which toys have many, biases of zero would make a stream of zeros, which
        # every norm then amplifies: the gradient would overflow.
        nn.init.normal_(self.first.bias, std=_FIRST_BIAS, generator=generator)

    def forward(
        self,
        activations: Mapping[str, SiteActivation],
        valid: Bool[Tensor, "*batch length"] | None = None,
    ) -> dict[str, Tensor]:
        # Normed, a one-hot vector is a constant times itself: the lookup needs no norm.
        inputs = {
            name: activations[name].input if shape.embedding else _normed(dense(activations[name].input))
            for name, shape in self.sites.items()
        }
        r = self.first(inputs)
        has_length = r.dim() > 2
        r = r if has_length else r.unsqueeze(-2)
        rotation = Rotation.of_positions(r.shape[-2], self.d_head, self.rope_base, r.device)
        keys = None if valid is None else _attended(valid)
        for block in self.blocks:
            r = block(r, rotation, keys)
        z = self.last(r if has_length else r.squeeze(-2))
        widths = [shape.C for shape in self.sites.values()]
        return dict(zip(self.sites, z.split(widths, dim=-1), strict=True))


class _Block(nn.Module):
    def __init__(self, options: GlobalTransformerCausalImportance, generator: torch.Generator) -> None:
        super().__init__()
        self.attention = _Attention(options.d_model, options.n_heads, generator)
        self.mlp = gelu_mlp([options.d_model, options.d_mlp, options.d_model], generator)

    def forward(
        self, r: Float[Tensor, "*batch length d_model"], rotation: "Rotation", keys: Tensor | None
    ) -> Float[Tensor, "*batch length d_model"]:
        r = r + self.attention(_normed(r), rotation, keys)
        r = r + self.mlp(_normed(r))
        return r


class _Attention(nn.Module):
    """Every position attends to every valid one, before and after it."""

    def __init__(self, d_model: int, n_heads: int, generator: torch.Generator) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv = linear(d_model, 3 * d_model, gain=1.0, generator=generator, bias=False)
        self.out = linear(d_model, d_model, gain=1.0, generator=generator, bias=False)

    def forward(
        self, x: Float[Tensor, "*batch length d_model"], rotation: "Rotation", keys: Tensor | None
    ) -> Float[Tensor, "*batch length d_model"]:
        heads = self.qkv(x).unflatten(-1, (3, self.n_heads, -1)).transpose(-4, -2)
        q, k, v = heads.unbind(-3)  # each [*batch, heads, length, d_head]
        # A lone position attends to itself. Fused attention would send q and k gradients of rounding errors,
        # which Adam scales up to steps of full size.
        if x.shape[-2] > 1:
            v = scaled_dot_product_attention(rotation.apply(q), rotation.apply(k), v, attn_mask=keys)
        written: Tensor = self.out(v.transpose(-3, -2).flatten(-2))
        return written


class Rotation(NamedTuple):
    """Rotary position embedding: pairs of coordinates, turned by an angle that grows with the position.

    Coordinates i and i + d/2 of a vector of width d at position t are turned by t · base^(-2i/d). A product
    of two turned vectors depends on the difference of their positions only. Source: Su et al., *RoFormer*,
    2021.
    """

    cos: Float[Tensor, "length half"]
    sin: Float[Tensor, "length half"]

    @classmethod
    def of_positions(cls, length: int, d: int, base: float, device: torch.device) -> "Rotation":
        """The rotations of positions 0 … length - 1, for vectors of width d."""
        frequencies = base ** (-torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)
        angles = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequencies
        return cls(angles.cos(), angles.sin())

    def apply(self, x: Float[Tensor, "*batch length d"]) -> Float[Tensor, "*batch length d"]:
        """The vectors, each turned by its position's rotation."""
        a, b = x.chunk(2, dim=-1)
        turned = torch.cat([a * self.cos - b * self.sin, a * self.sin + b * self.cos], dim=-1)
        return turned.to(x.dtype)  # the angles are float32 under autocast, too


def _normed(x: Float[Tensor, "*positions d"]) -> Float[Tensor, "*positions d"]:
    """x divided by its root mean square."""
    return rms_norm(x, (x.shape[-1],))


def _attended(valid: Bool[Tensor, "*batch length"]) -> Bool[Tensor, "*batch 1 1 length"]:
    """Which keys may be attended to, in every head and from every position."""
    # A row of padding alone attends to itself: over no key at all a softmax would be NaN.
    return (valid | ~valid.any(-1, keepdim=True))[..., None, None, :]
