"""Residual MLPs that compute x + ReLU(x) of more features than they have neurons."""

import dataclasses
import math
from collections.abc import Iterator
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra.factored import KeepsFactors, WritingLinear
from spd_hydra.model.base import KnownAnswer, Measurement
from spd_hydra.model.tms import PROBE_MAGNITUDE, linear
from spd_hydra.model.training import TrainableTarget, trained_parameters
from spd_hydra.section import option, register


class MLPLayer(nn.Module):
    """mlp_out(ReLU(mlp_in(residual))), without biases."""

    def __init__(
        self, weight_in: Float[Tensor, "d_mlp d_embed"], weight_out: Float[Tensor, "d_embed d_mlp"]
    ) -> None:
        super().__init__()
        self.mlp_in = linear(nn.Parameter(weight_in))
        self.mlp_out = linear(nn.Parameter(weight_out), WritingLinear)

    def forward(self, residual: Float[Tensor, "*positions d_embed"]) -> Float[Tensor, "*positions d_embed"]:
        """What the layer adds to the residual stream."""
        added: Tensor = self.mlp_out(torch.relu(self.mlp_in(residual)))
        return added


class ResidMLPModel(KeepsFactors):
    """W_U (x W_E + Σ layers), with a fixed random embedding and its transpose as unembedding.

    Attributes:
        W_E: `[n_features, d_embed]`, unit rows, never trained.
        layers: the residual layers, `layers.{i}.mlp_in` and `layers.{i}.mlp_out`.
    """

    W_E: Float[Tensor, "n_features d_embed"]

    def __init__(self, W_E: Float[Tensor, "n_features d_embed"], layers: list[MLPLayer]) -> None:
        super().__init__()
        self.register_buffer("W_E", W_E)
        self.layers = nn.ModuleList(layers)

    @property
    def W_U(self) -> Float[Tensor, "d_embed n_features"]:
        """The unembedding, W_Eᵀ."""
        return self.W_E.T

    def forward(self, x: Float[Tensor, "*positions n_features"]) -> Float[Tensor, "*positions n_features"]:
        """The unembedded residual stream after all layers."""
        residual = self.written(x, self.W_E)
        for layer in self.layers:
            residual = residual + layer(residual)
        return nn.functional.linear(cast(Tensor, residual), self.W_E)

    def folded(self, x: Float[Tensor, "batch n_features"]) -> Float[Tensor, "batch n_features"]:
        """The same output with the embedding multiplied into the weights first.

        The residual stream is linear in x and in the layers' neurons, so no vector of d_embed numbers
        is needed per input: with d_embed much larger than features and neurons this saves most of the work.
        """
        weight_in = torch.cat([layer.mlp_in.weight for layer in self.mlp_layers()])
        weight_out = torch.cat([layer.mlp_out.weight for layer in self.mlp_layers()], dim=1)
        from_embedding = x @ (self.W_E @ weight_in.T)  # what all neurons, layer after layer, read of x
        reads = weight_out.T @ weight_in.T if len(self.layers) > 1 else None  # [writer, reader]
        activations: list[Tensor] = []
        first = 0
        for layer in self.mlp_layers():
            last = first + layer.mlp_in.out_features
            before = from_embedding[:, first:last]
            if reads is not None and activations:
                before = before + torch.cat(activations, dim=1) @ reads[:first, first:last]
            activations.append(torch.relu(before))
            first = last
        output = x @ (self.W_E @ self.W_U)
        return output + torch.cat(activations, dim=1) @ (weight_out.T @ self.W_U)

    def mlp_layers(self) -> Iterator[MLPLayer]:
        """The layers in order, typed."""
        for layer in self.layers:
            yield cast(MLPLayer, layer)


def idle_neurons(module: ResidMLPModel, probe: Float[Tensor, "n_features n_features"]) -> int:
    """How many neurons no lone feature turns on.

    Args:
        module: the residual MLP.
        probe: row i has feature i alone.
    """
    residual, idle = probe @ module.W_E, 0
    for layer in module.mlp_layers():
        idle += int((layer.mlp_in(residual) <= 0).all(dim=0).sum())
        residual = residual + layer(residual)
    return idle


def layer_effects(
    module: ResidMLPModel, probe: Float[Tensor, "n_features n_features"]
) -> Float[Tensor, "n_layers n_features"]:
    """What each layer adds for a lone feature: norm over all outputs.

    Args:
        module: the residual MLP.
        probe: row i has feature i alone.
    """
    residual, effects = probe @ module.W_E, []
    for layer in module.mlp_layers():
        added = layer(residual)
        residual = residual + added
        effects.append((added @ module.W_U).norm(dim=1))
    return torch.stack(effects)


@register("model", "resid_mlp")
@dataclasses.dataclass(kw_only=True)
class ResidMLP(TrainableTarget):
    """Residual MLP that approximates x + ReLU(x) (paper, section 3.2): compressed computation."""

    n_features: int = option(100, "number of input and output features", ge=2)
    d_embed: int = option(1000, "width of the residual stream", ge=1)
    n_layers: int = option(1, "number of residual MLP layers", ge=1)
    d_mlp: int = option(50, "neurons per layer", ge=1)
    min_response: float = option(
        0.0,
        "certified: share of ReLU(x) that the MLPs add to a lone feature's own output, at least",
        ge=0,
        le=1,
    )
    max_interference: float = option(
        1.0, "certified: a lone feature's effect on another output over its input, at most", gt=0
    )
    min_layer_effect: float = option(
        0.0, "certified: norm of what each layer adds for a lone feature over its input, at least", ge=0
    )

    max_idle_neurons: int | None = option(
        None, "certified: neurons that no lone feature turns on, at most; null: no limit", ge=0
    )

    def build(self, generator: torch.Generator) -> ResidMLPModel:
        """Rows of W_E uniform on the sphere; W_in ~ N(0, 2 / d_embed), W_out ~ N(0, 1 / d_mlp)."""
        embedding = torch.randn(self.n_features, self.d_embed, generator=generator)
        layers = [
            MLPLayer(
                torch.randn(self.d_mlp, self.d_embed, generator=generator) * math.sqrt(2 / self.d_embed),
                torch.randn(self.d_embed, self.d_mlp, generator=generator) / math.sqrt(self.d_mlp),
            )
            for _ in range(self.n_layers)
        ]
        return ResidMLPModel(embedding / embedding.norm(dim=1, keepdim=True), layers)

    def training_loss(self, module: nn.Module, batch: Float[Tensor, "batch n_features"]) -> Float[Tensor, ""]:
        """Squared error against x + ReLU(x), mean over batch and features."""
        return torch.mean((module(batch) - batch - torch.relu(batch)) ** 2)

    def gradients(self, module: nn.Module, batch: Float[Tensor, "batch n_features"]) -> list[Tensor]:
        """The gradients of `training_loss`, through the folded forward pass.

        An input without active features comes out as it should whatever the weights, so it is left out.
        """
        active = batch[batch.any(dim=1)]
        output = cast(ResidMLPModel, module).folded(active)
        loss = torch.sum((output - active - torch.relu(active)) ** 2) / batch.numel()
        return list(torch.autograd.grad(loss, trained_parameters(module)))

    @torch.no_grad()
    def certify(self, module: nn.Module) -> list[Measurement]:
        """How well lone features at 0.75 come out.

        `response`: (own output - 0.75) / 0.75, smallest over features; 1 is exact.
        `interference`: |output of another feature| / 0.75, largest over pairs; 0 is exact.
        `layer_effect`: norm of what a layer adds to the outputs / 0.75, smallest over layers and features;
        a layer that does next to nothing with a feature needs no subcomponent for it.
        `idle_neurons`: neurons that none of these turns on, over all layers: the known answer has a
        subcomponent of `mlp_out` for each, of which the causal importances of these inputs show nothing.
        """
        probe = self._probe(module)
        idle = idle_neurons(cast(ResidMLPModel, module), probe)
        most_idle = math.inf if self.max_idle_neurons is None else self.max_idle_neurons
        output = module(probe).cpu() / PROBE_MAGNITUDE
        response = (output.diagonal() - 1).min().item()
        others = output.masked_fill(torch.eye(self.n_features, dtype=torch.bool), 0.0)
        effect = layer_effects(cast(ResidMLPModel, module), probe).min().item() / PROBE_MAGNITUDE
        return [
            Measurement(name="response", value=response, lower=self.min_response, upper=math.inf),
            Measurement(
                name="interference", value=others.abs().max().item(), lower=0, upper=self.max_interference
            ),
            Measurement(name="layer_effect", value=effect, lower=self.min_layer_effect, upper=math.inf),
            Measurement(name="idle_neurons", value=idle, lower=0, upper=most_idle),
        ]

    def known_answer(self, module: nn.Module) -> KnownAnswer:
        """One subcomponent per feature at every `mlp_in`; every `mlp_out` needs all its neurons."""
        identity = {f"layers.{i}.mlp_in": self.n_features for i in range(self.n_layers)}
        dense = {f"layers.{i}.mlp_out": self.d_mlp for i in range(self.n_layers)}
        embedding = module.get_buffer("W_E").detach()
        return KnownAnswer(
            probe=self._probe(module),
            identity=identity,
            dense=dense,
            directions=dict.fromkeys(identity, embedding),
            cosine_decides=False,
            expected_alive=identity | dense,
        )

    def _probe(self, module: nn.Module) -> Float[Tensor, "n_features n_features"]:
        return PROBE_MAGNITUDE * torch.eye(self.n_features, device=module.get_buffer("W_E").device)
