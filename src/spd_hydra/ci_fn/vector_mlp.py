"""`vector_mlp`: a private MLP per subcomponent on the site's whole input vector."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu

from spd_hydra.ci_fn.base import CausalImportanceFn, SiteActivation, SiteShape, kaiming_normal
from spd_hydra.factored import dense
from spd_hydra.section import ConfigError, option, register


@register("ci_fn", "vector_mlp")
@dataclasses.dataclass(kw_only=True)
class VectorMLPCausalImportance(CausalImportanceFn):
    """z_c = MLP_c(x): one `d_in → hidden → 1` GELU network per subcomponent."""

    hidden: int = option(12, "width of each subcomponent's private hidden layer", ge=1)

    def build(self, sites: Mapping[str, SiteShape], generator: torch.Generator) -> nn.Module:
        return _VectorMLP(sites, self.hidden, generator)


class _VectorMLP(nn.Module):
    def __init__(self, sites: Mapping[str, SiteShape], hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        refuse_embeddings(sites, "vector_mlp")
        self.sites = nn.ModuleDict(
            {
                name.replace(".", "/"): _SiteVectorMLP(shape, hidden, generator)
                for name, shape in sites.items()
            }
        )

    def forward(self, activations: Mapping[str, SiteActivation]) -> dict[str, Tensor]:
        return {
            name: self.sites[name.replace(".", "/")](dense(activation.input))
            for name, activation in activations.items()
        }


class _SiteVectorMLP(nn.Module):
    def __init__(self, shape: SiteShape, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.w_in = kaiming_normal(
            (shape.d_in, shape.C, hidden), fan_in=shape.d_in, gain=2**0.5, generator=generator
        )
        self.b_in = nn.Parameter(torch.zeros(shape.C, hidden))
        self.w_out = kaiming_normal((shape.C, hidden), fan_in=hidden, gain=1.0, generator=generator)
        self.b_out = nn.Parameter(torch.zeros(shape.C))

    def forward(self, x: Float[Tensor, "*positions d_in"]) -> Float[Tensor, "*positions C"]:
        z: Tensor = _PrivateVectorMLP.apply(x, self.w_in, self.b_in, self.w_out)  # type: ignore[no-untyped-call]
        return z + self.b_out


class _PrivateVectorMLP(torch.autograd.Function):
    """The hidden layers, made again in the backward pass: `[positions, C, hidden]` is too large to keep."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
        return (gelu(_hidden(x, w_in, b_in)) * w_out).sum(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        x, w_in, b_in, w_out = ctx.saved_tensors
        rows = x.flatten(0, -2).to(w_in.dtype)  # autocast, which is off here, had cast a half-precision x
        pre = _hidden(rows, w_in, b_in)
        cdf = 0.5 * (1 + torch.erf(pre / math.sqrt(2)))
        pdf = torch.exp(-0.5 * pre * pre) / math.sqrt(2 * math.pi)
        grad = grad_z.flatten(0, -2)[..., None]
        grad_pre = grad * w_out * (cdf + pre * pdf)
        flat = grad_pre.flatten(1)
        return (
            (flat @ w_in.flatten(1).T).reshape(x.shape) if ctx.needs_input_grad[0] else None,
            (rows.T @ flat).reshape(w_in.shape),
            grad_pre.sum(0),
            (grad * pre * cdf).sum(0),
        )


def _hidden(x: Tensor, w_in: Tensor, b_in: Tensor) -> Float[Tensor, "*positions C hidden"]:
    return (x @ w_in.flatten(1)).reshape(*x.shape[:-1], *b_in.shape) + b_in


def refuse_embeddings(sites: Mapping[str, SiteShape], kind: str) -> None:
    """Raise ConfigError if a site is an embedding: its input is a token id, not a vector."""
    for name, shape in sites.items():
        if shape.embedding:
            raise ConfigError(
                f"ci_fn: {kind} reads a site's input vector, but site {name!r} is an embedding, whose input "
                f"is a token id; use ci_fn=mlp, or leave this site out"
            )
