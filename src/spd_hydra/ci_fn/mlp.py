"""`mlp`: a private MLP per subcomponent on its own inner activation (the paper's choice)."""

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from spd_hydra.ci_fn.base import CausalImportanceFn, SiteActivation, SiteShape, kaiming_normal
from spd_hydra.ci_fn.layers import site_key
from spd_hydra.ci_fn.private_gelu import private_gelu_mlp
from spd_hydra.section import option, register


@register("ci_fn", "mlp")
@dataclasses.dataclass(kw_only=True)
class MLPCausalImportance(CausalImportanceFn):
    """z_c = MLP_c(h_c) with h_c = x·V_c: one `1 → hidden → 1` GELU network per subcomponent (paper, §3)."""

    hidden: int = option(16, "width of each subcomponent's private hidden layer", ge=1)

    def build(self, sites: Mapping[str, SiteShape], generator: torch.Generator) -> nn.Module:
        return _MLP(sites, self.hidden, generator)


class _MLP(nn.Module):
    def __init__(self, sites: Mapping[str, SiteShape], hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.sites = nn.ModuleDict(
            {site_key(name): _SiteMLP(shape.C, hidden, generator) for name, shape in sites.items()}
        )

    def forward(
        self, activations: Mapping[str, SiteActivation], valid: Bool[Tensor, "*positions"] | None = None
    ) -> dict[str, Tensor]:
        return {name: self.sites[site_key(name)](own.inner) for name, own in activations.items()}


class _SiteMLP(nn.Module):
    def __init__(self, C: int, hidden: int, generator: torch.Generator) -> None:
        super().__init__()
        self.w_in = kaiming_normal((C, hidden), fan_in=1, gain=2**0.5, generator=generator)
        self.b_in = nn.Parameter(torch.zeros(C, hidden))
        self.w_out = kaiming_normal((C, hidden), fan_in=hidden, gain=1.0, generator=generator)
        self.b_out = nn.Parameter(torch.zeros(C))

    def forward(self, h: Float[Tensor, "*positions C"]) -> Float[Tensor, "*positions C"]:
        return private_gelu_mlp(h, self.w_in, self.b_in, self.w_out) + self.b_out
