"""Induction heads: two layers of attention that find what followed a token the last time it was there."""

import dataclasses
import math
from collections.abc import Iterator
from typing import cast

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from spd_hydra import rng
from spd_hydra.model.base import Measurement
from spd_hydra.model.tms import linear
from spd_hydra.model.training import TrainableTarget
from spd_hydra.section import Problem, option, register

_PROBES = 4096  # sequences on which a trained model is certified
_SLOWEST = 100.0  # longest wavelength of the positions over 2π, in tokens


class Attention(nn.Module):
    """Causal attention without biases; positions are added to what queries and keys read, nowhere else."""

    positions: Float[Tensor, "length d_model"]

    def __init__(
        self, matrices: list[Tensor], n_heads: int, positions: Float[Tensor, "length d_model"]
    ) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(nn.Parameter(m)) for m in matrices)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, stream: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch length d_model"]:
        """What the layer adds to the stream."""
        placed = stream + self.positions
        q, k, v = (self._by_head(x) for x in (self.q_proj(placed), self.k_proj(placed), self.v_proj(stream)))
        found = scaled_dot_product_attention(q, k, v, is_causal=True)
        return cast(Tensor, self.o_proj(found.transpose(1, 2).flatten(-2)))

    def _by_head(self, x: Float[Tensor, "batch length d_model"]) -> Float[Tensor, "batch head length d_head"]:
        return x.view(*x.shape[:-1], self.n_heads, -1).transpose(1, 2)


class InductionModel(nn.Module):
    """Embedding, layers of attention alone, and the unembedding of the last position.

    Attributes:
        embed: tokens; `layers.{i}.q_proj`, `k_proj`, `v_proj`, `o_proj`: attention; `unembed`: logits.
    """

    def __init__(self, embed: Tensor, layers: list[Attention], unembed: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding(embed.shape[0], embed.shape[1], _weight=embed)
        self.layers = nn.ModuleList(layers)
        self.unembed = linear(nn.Parameter(unembed))

    def forward(self, tokens: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch n_vocab"]:
        """Logits of the token after the last one."""
        stream = self.embed(tokens)
        for layer in self.layers:
            stream = stream + layer(stream)
        return cast(Tensor, self.unembed(stream[:, -1]))


@register("model", "induction_heads")
@dataclasses.dataclass(kw_only=True)
class InductionHeads(TrainableTarget):
    """A small attention-only transformer that completes … s m … s with m.

    A sequence is a token for its beginning, then random tokens, among which the induction token s stands
    once, and s again at the end. What followed the first s is the answer. One layer has to look at the token
    before, the next one for the place whose token before was s.
    """

    n_tokens: int = option(128, "ordinary tokens; the beginning and the induction token come on top", ge=2)
    length: int = option(64, "tokens per sequence", ge=4)
    d_model: int = option(16, "width of the residual stream", ge=2)
    n_heads: int = option(1, "heads per layer; divide d_model", ge=1)
    n_layers: int = option(2, "layers of attention", ge=1)
    min_accuracy: float = option(
        0.99, "certified: share of fresh sequences that are completed rightly, at least", ge=0, le=1
    )

    def problems(self) -> Iterator[Problem]:
        """Adds: heads and waves share the width evenly."""
        yield from super().problems()
        if self.d_model % 2:
            yield Problem("d_model", f"got {self.d_model}, must be even")
        if self.d_model % self.n_heads:
            yield Problem("n_heads", f"got {self.n_heads}, must divide d_model ({self.d_model})")

    @property
    def beginning(self) -> int:
        """The token that every sequence begins with."""
        return self.n_tokens

    @property
    def induction_token(self) -> int:
        """The token that stands twice in every sequence: s."""
        return self.n_tokens + 1

    def vocab_size(self) -> int:
        """Ordinary tokens, beginning, induction token."""
        return self.n_tokens + 2

    def gives_logits(self) -> bool:
        """Of every token."""
        return True

    def context_length(self) -> int:
        """Every sequence is as long as any."""
        return self.length

    def build(self, generator: torch.Generator) -> InductionModel:
        """All matrices N(0, 1/d_model); positions are sines and cosines."""

        def drawn(d_out: int) -> Tensor:
            return torch.randn(d_out, self.d_model, generator=generator) / math.sqrt(self.d_model)

        embed, unembed = drawn(self.vocab_size()), drawn(self.vocab_size())
        positions = waves(self.length, self.d_model)
        layers = [
            Attention([drawn(self.d_model) for _ in range(4)], self.n_heads, positions)
            for _ in range(self.n_layers)
        ]
        return InductionModel(embed, layers, unembed)

    def sequences(
        self, key: Int32[Tensor, "2"], rows: Int32[Tensor, " batch"]
    ) -> Int64[Tensor, "batch length"]:
        """Random sequences; the first s is at any place from the second to the last but two.

        Args:
            key: of the purpose and step.
            rows: indices in the global batch; a row depends on nothing but the key and its index.
        """
        places = torch.arange(self.length, dtype=torch.int32, device=rows.device)
        draws = rng.uniform(key, rows, places)
        first = 1 + (draws[:, :1] * (self.length - 3)).to(torch.int32)
        tokens = (draws * self.n_tokens).to(torch.int64)
        tokens = torch.where(places == 0, self.beginning, tokens)
        return torch.where((places == first) | (places == self.length - 1), self.induction_token, tokens)

    def answers(self, tokens: Int64[Tensor, "batch length"]) -> Int64[Tensor, " batch"]:
        """The token after the first s."""
        first = (tokens == self.induction_token).to(torch.int8).argmax(dim=1)
        return tokens.gather(1, first[:, None] + 1)[:, 0]

    def training_loss(self, module: nn.Module, batch: Int64[Tensor, "batch length"]) -> Float[Tensor, ""]:
        """Cross-entropy of the answer in nats, mean over sequences."""
        return cross_entropy(module(batch), self.answers(batch))

    @torch.no_grad()
    def certify(self, module: nn.Module) -> list[Measurement]:
        """`accuracy`: share of fresh sequences whose answer has the largest logit."""
        device = module.get_parameter("embed.weight").device
        rows = torch.arange(_PROBES, dtype=torch.int32, device=device)
        tokens = self.sequences(rng.key(0, "induction_probe").to(device), rows)
        right = module(tokens).argmax(dim=-1) == self.answers(tokens)
        accuracy = right.float().mean().item()
        return [Measurement(name="accuracy", value=accuracy, lower=self.min_accuracy, upper=1.0)]


def waves(length: int, width: int) -> Float[Tensor, "length width"]:
    """Sines and cosines of the position, from one radian per token to one per hundred."""
    rates = _SLOWEST ** (-torch.arange(width // 2) / (width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
