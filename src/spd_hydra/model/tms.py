"""Toy model of superposition: more features than hidden dimensions, tied embedding."""

import dataclasses
import math
from enum import Enum

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra.model.base import KnownAnswer, Measurement
from spd_hydra.model.training import TrainableTarget
from spd_hydra.model.transposed import TransposedLinear
from spd_hydra.section import option, register

PROBE_MAGNITUDE = 0.75


class BiasInit(Enum):
    """How the output bias starts: at zero, or uniform in ±1/sqrt(n_hidden) as `nn.Linear` does."""

    zero = "zero"
    uniform = "uniform"


class TMSModel(nn.Module):
    """ReLU(Wᵀ I … I W x + b): `embed` is W, each `hidden.i` a fixed identity, `unembed` is Wᵀ and b."""

    def __init__(
        self,
        weight: Float[Tensor, "n_hidden n_features"],
        bias: Float[Tensor, " n_features"],
        n_hidden_layers: int,
    ) -> None:
        super().__init__()
        n_hidden = weight.shape[0]
        shared = nn.Parameter(weight)
        self.embed = linear(shared)
        self.hidden = nn.ModuleList(linear(nn.Parameter(torch.eye(n_hidden))) for _ in range(n_hidden_layers))
        self.hidden.requires_grad_(False)
        self.unembed = TransposedLinear(shared, nn.Parameter(bias))

    def forward(self, x: Float[Tensor, "*positions n_features"]) -> Float[Tensor, "*positions n_features"]:
        """Reconstruct the features."""
        x = self.embed(x)
        for layer in self.hidden:
            x = layer(x)
        return torch.relu(self.unembed(x))


def linear(weight: Float[nn.Parameter, "d_out d_in"], kind: type[nn.Linear] = nn.Linear) -> nn.Linear:
    """An `nn.Linear` without bias that holds this weight and drew nothing from torch's global generator."""
    d_out, d_in = weight.shape
    layer = kind(d_in, d_out, bias=False, device="meta")
    layer.weight = weight
    return layer


@register("model", "tms")
@dataclasses.dataclass(kw_only=True)
class TMS(TrainableTarget):
    """Toy model of superposition (paper, section 3.1): y = ReLU(Wᵀ W x + b)."""

    n_features: int = option(5, "number of input and output features", ge=2)
    n_hidden: int = option(2, "dimensions that the features are squeezed into", ge=1)
    n_hidden_layers: int = option(0, "fixed identity layers between embedding and unembedding", ge=0, le=1)
    bias_init: BiasInit = option(
        BiasInit.uniform, "start of the output bias: zero | uniform (±1/sqrt(n_hidden))"
    )
    min_response: float = option(
        0.5, "certified: a lone feature's own output over its input, at least", gt=0, le=1
    )
    max_norm_deviation: float = option(
        0.05, "certified, n_hidden=2: a column's norm over their mean, off by at most", gt=0
    )
    max_angle_deviation: float = option(
        3.0, "certified, n_hidden=2: neighbouring columns' angle, off 360/n_features degrees by at most", gt=0
    )

    def build(self, generator: torch.Generator) -> TMSModel:
        """W ~ U(±1/sqrt(n_features)); the bias as `bias_init` says."""
        weight = _symmetric_uniform(generator, self.n_hidden, self.n_features) / math.sqrt(self.n_features)
        bias = _symmetric_uniform(generator, self.n_features) / math.sqrt(self.n_hidden)
        if self.bias_init is BiasInit.zero:
            bias = torch.zeros_like(bias)
        return TMSModel(weight, bias, self.n_hidden_layers)

    def training_loss(self, module: nn.Module, batch: Float[Tensor, "batch n_features"]) -> Float[Tensor, ""]:
        """Squared error of the reconstruction, mean over batch and features."""
        return torch.mean((module(batch) - batch) ** 2)

    @torch.no_grad()
    def gradients(self, module: nn.Module, batch: Float[Tensor, "batch n_features"]) -> list[Tensor]:
        """The gradients of `training_loss` by W and b, written out: a tenth of autograd's calls.

        With z = W x, p = Wᵀz + b and d = 2 (p - x) [p > 0] / numel(x), summed over the batch:
        dL/dW = z dᵀ + (W d) xᵀ and dL/db = d. The identity layer changes none of it.
        """
        weight, bias = module.get_parameter("embed.weight"), module.get_parameter("unembed.bias")
        z = batch @ weight.T
        p = torch.addmm(bias, z, weight)
        d: Tensor = torch.ops.aten.threshold_backward(
            p - batch, p, 0
        )  # one pass; torch.where takes four times as long
        scale = 2 / batch.numel()
        weight_gradient = torch.addmm((d @ weight.T).T @ batch, z.T, d) * scale
        return [weight_gradient, d.sum(dim=0) * scale]

    @torch.no_grad()
    def hopeless(self, module: nn.Module) -> bool:
        """Whether some output is zero for every input in [0, 1], so that its loss moves nothing any more."""
        weight, bias = module.get_parameter("embed.weight"), module.get_parameter("unembed.bias")
        highest = bias + (weight.T @ weight).clamp(min=0).sum(dim=1)
        return bool((highest <= 0).any())

    @torch.no_grad()
    def certify(self, module: nn.Module) -> list[Measurement]:
        """Every feature is represented; with two hidden dimensions they form a regular polygon.

        `margin`: own output minus the largest other one, smallest over features alone at 0.75.
        `response`: own output over 0.75, smallest over features. `norm_deviation`,
        `angle_deviation`: largest over the columns of the embedding.
        """
        output = module(self._probe(module)).cpu()
        own = output.diagonal()
        others = output.masked_fill(torch.eye(self.n_features, dtype=torch.bool), -math.inf).amax(dim=1)
        margin = (own - others).min().item()
        response = (own.min() / PROBE_MAGNITUDE).item()
        found = [
            Measurement(name="margin", value=margin, lower=math.ulp(0.0), upper=math.inf),
            Measurement(name="response", value=response, lower=self.min_response, upper=math.inf),
        ]
        if self.n_hidden == 2:
            columns = module.get_parameter("embed.weight").detach().cpu()
            norms = columns.norm(dim=0)
            norm_deviation = (norms / norms.mean() - 1).abs().max().item()
            angles = torch.atan2(columns[1], columns[0]).rad2deg().sort().values
            gaps = torch.cat([angles.diff(), angles[:1] + 360 - angles[-1:]])
            angle_deviation = (gaps - 360 / self.n_features).abs().max().item()
            found += [
                Measurement(
                    name="norm_deviation", value=norm_deviation, lower=0, upper=self.max_norm_deviation
                ),
                Measurement(
                    name="angle_deviation", value=angle_deviation, lower=0, upper=self.max_angle_deviation
                ),
            ]
        return found

    def known_answer(self, module: nn.Module) -> KnownAnswer:
        """One subcomponent per feature at embed and unembed; the identity layer needs its full rank."""
        identity = {"embed": self.n_features, "unembed": self.n_features}
        dense = {f"hidden.{i}": self.n_hidden for i in range(self.n_hidden_layers)}
        probe = self._probe(module)
        return KnownAnswer(
            probe=probe,
            identity=identity,
            dense=dense,
            directions={"embed": probe / PROBE_MAGNITUDE},
            cosine_decides=True,
            expected_alive=identity | dense,
        )

    def _probe(self, module: nn.Module) -> Float[Tensor, "n_features n_features"]:
        device = module.get_parameter("embed.weight").device
        return PROBE_MAGNITUDE * torch.eye(self.n_features, device=device)


def _symmetric_uniform(generator: torch.Generator, *shape: int) -> Tensor:
    return 2 * torch.rand(*shape, generator=generator) - 1
