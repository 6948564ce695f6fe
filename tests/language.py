"""A language model of two matrices: its logits depend on the present token alone."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spd_hydra import rng
from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.data.base import Batches, DataSource
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective
from spd_hydra.model.base import TargetSpec
from spd_hydra.precision import Precision
from spd_hydra.section import option, register

# Chances of the next token, by the present one.
CHANCES = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]])
# Logits that the subcomponents of `unembed` give; the rest of the target's is the weight delta.
PIECES = torch.tensor([[1.0, 0.0, -1.0], [0.0, 2.0, 0.0], [0.5, 0.0, 1.0]])
IMPORTANCES = torch.tensor([1.0, 0.5, 0.0])  # of the subcomponents of `unembed`, at every position


class Bigram(nn.Module):
    """Logits of the next token from the present one; padding, which is negative, is read as token 0."""

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.unembed = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.unembed(self.embed(tokens.clamp(min=0)))
        return logits


def hand_made() -> DecomposedModel:
    """Logits are log CHANCES, and every number is set by hand.

    `embed` is the identity, as are its pieces, with g = 1; at `unembed` piece c reads token c.
    """
    target = Bigram(3, 3)
    sites = {
        "reads": SitePattern(pattern="embed", C=3),
        "writes": SitePattern(pattern="unembed", C=3),
    }
    config = Decomposition(sites=sites)
    model = DecomposedModel(target, config, MLPCausalImportance(hidden=1), seed=0)
    values = {
        "target.embed.weight": torch.eye(3),
        "target.unembed.weight": CHANCES.log().T,
        "subcomponents.embed.V": torch.eye(3),
        "subcomponents.embed.U": torch.eye(3),
        "subcomponents.unembed.V": torch.eye(3),
        "subcomponents.unembed.U": PIECES,
        "ci_fn.sites.embed.w_out": torch.zeros(3, 1),
        "ci_fn.sites.embed.b_out": torch.ones(3),
        "ci_fn.sites.unembed.w_out": torch.zeros(3, 1),
        "ci_fn.sites.unembed.b_out": IMPORTANCES,
    }
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name).copy_(value)
    return model


def objective_of(model: DecomposedModel, divergence: Divergence = Divergence.kl) -> Objective:
    losses = LossSet(divergence=divergence)
    return Objective(model, losses, precision=Precision.fp32, ci_threshold=0.1, padded=True)


@register("model", "test_bigram")
@dataclasses.dataclass(kw_only=True)
class BigramSpec(TargetSpec):
    """An untrained bigram model."""

    vocabulary: int = option(12, "tokens", ge=2)
    width: int = option(6, "width of the stream", ge=1)
    next_token: bool = option(True, "whether the logits are said to be of the next token")

    def build(self, generator: torch.Generator) -> nn.Module:
        module = Bigram(self.vocabulary, self.width)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return module

    def predicts_next_token(self) -> bool:
        return self.next_token


class TokenBatches(Batches):
    """Uniform tokens, one of them hostile; the last one of every other row is padding."""

    padded = True

    def __init__(self, vocabulary: int, length: int) -> None:
        self.vocabulary, self.length = vocabulary, length

    def __call__(self, key: Tensor, rows: Tensor) -> Tensor:
        draws = rng.uniform(key, rows, rng.columns("tokens", self.length).to(rows.device))
        tokens = (draws * self.vocabulary).long()
        tokens[rows.long() % 2 == 1, -1] = -1
        return tokens

    def decode(self, ids: Sequence[int]) -> list[str] | None:
        return ["<script>alert(1)</script>" if token == 0 else f" tok{token}" for token in ids]


@register("data", "test_tokens")
@dataclasses.dataclass(kw_only=True)
class Tokens(DataSource):
    """Rows of uniform tokens."""

    length: int = option(9, "tokens per row", ge=2)

    def bind(self, target: TargetSpec) -> Batches:
        assert isinstance(target, BigramSpec), "a test gives these data to that model"
        return TokenBatches(target.vocabulary, self.length)
