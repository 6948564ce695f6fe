"""`vector_mlp`: a private MLP per subcomponent on the site's whole input vector."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding, gelu

from spd_hydra.ci_fn.base import CausalImportanceFn, SiteActivation, SiteShape, kaiming_normal
from spd_hydra.ci_fn.layers import HIDDEN_GAIN, site_key
from spd_hydra.factored import dense
from spd_hydra.section import option, register


@register("ci_fn", "vector_mlp")
@dataclasses.dataclass(kw_only=True)
class VectorMLPCausalImportance(CausalImportanceFn):
    """z_c = MLP_c(x): one `d_in → hidden → 1` GELU network per subcomponent.

    At an embedding d_in is the number of tokens, and a token reads C · hidden of the d_in · C · hidden
    weights.
    """

    hidden: int = option(12, "width of each subcomponent's private hidden layer", ge=1)

    def build(self, sites: Mapping[str, SiteShape], generator: torch.Generator) -> nn.Module:
        return _VectorMLP(sites, self.hidden, generator)


class _VectorMLP(nn.Module):
    def __init__(self, sites: Mapping[str, SiteShape], hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.sites = nn.ModuleDict(
            {site_key(name): _SiteVectorMLP(shape, hidden, generator) for name, shape in sites.items()}
        )

    def forward(
        self, activations: Mapping[str, SiteActivation], valid: Bool[Tensor, "*positions"] | None = None
    ) -> dict[str, Tensor]:
        return {name: self.sites[site_key(name)](dense(own.input)) for name, own in activations.items()}


class _SiteVectorMLP(nn.Module):
    def __init__(self, shape: SiteShape, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        fan_in = 1 if shape.embedding else shape.d_in  # one entry of a one-hot vector is not 0
        self.w_in = kaiming_normal(
            (shape.d_in, shape.C, hidden), fan_in=fan_in, gain=HIDDEN_GAIN, generator=generator
        )
        self.b_in = nn.Parameter(torch.zeros(shape.C, hidden))
        self.w_out = kaiming_normal((shape.C, hidden), fan_in=hidden, gain=1.0, generator=generator)
        self.b_out = nn.Parameter(torch.zeros(shape.C))

    def forward(
        self, x: Float[Tensor, "*positions d_in"] | Int[Tensor, "*positions"]
    ) -> Float[Tensor, "*positions C"]:
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
        # Autocast, which is off here, had cast an x of half precision.
        rows = x.flatten(0, -2).to(w_in.dtype) if x.is_floating_point() else x.flatten()
        pre = _hidden(rows, w_in, b_in)
        cdf = 0.5 * (1 + torch.erf(pre / math.sqrt(2)))
        pdf = torch.exp(-0.5 * pre * pre) / math.sqrt(2 * math.pi)
        grad = grad_z.flatten(0, -2)[..., None]
        grad_pre = grad * w_out * (cdf + pre * pdf)
        flat = grad_pre.flatten(1)
        if x.is_floating_point():
            grad_w_in = rows.T @ flat
        else:
            grad_w_in = torch.zeros_like(w_in).flatten(1).index_add(0, rows, flat)
        return (
            (flat @ w_in.flatten(1).T).reshape(x.shape) if ctx.needs_input_grad[0] else None,
            grad_w_in.reshape(w_in.shape),
            grad_pre.sum(0),
            (grad * pre * cdf).sum(0),
        )


def _hidden(x: Tensor, w_in: Tensor, b_in: Tensor) -> Float[Tensor, "*positions C hidden"]:
    """Before the activation function; x are vectors or, as whole numbers, tokens."""
    pre = x @ w_in.flatten(1) if x.is_floating_point() else embedding(x, w_in.flatten(1))
    return pre.reshape(*pre.shape[:-1], *b_in.shape) + b_in
