"""Induction heads: two layers of attention that find what followed a token the last time."""

from typing import cast

from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from spd_hydra.model.tms import linear

_PROBES = 8192  # sequences on which a trained model is certified


class Attention(nn.Module):
    """Causal attention of one or more heads, without biases."""

    def __init__(self, matrices: list[Tensor], n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (linear(nn.Parameter(m)) for m in matrices)

    def forward(self, stream: Float[Tensor, "batch length d"]) -> Float[Tensor, "batch length d"]:
        """What the layer adds to the stream."""
        q, k, v = (
            proj(stream).unflatten(-1, (self.n_heads, -1)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        found = scaled_dot_product_attention(q, k, v, is_causal=True)
        return cast(Tensor, self.o_proj(found.transpose(1, 2).flatten(-2)))


class InductionModel(nn.Module):
    """Token and position embedding, attention-only layers, unembedding at the last position."""

    def __init__(
        self,
        W_E: Float[Tensor, "n_tokens d"],
        W_pos: Float[Tensor, "length d"],
        layers: list[Attention],
        W_U: Float[Tensor, "n_tokens d"],
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(W_E, freeze=False)
        self.W_pos = nn.Parameter(W_pos)
        self.layers = nn.ModuleList(layers)
        self.unembed = linear(nn.Parameter(W_U))

    def forward(self, tokens: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch n_tokens"]:
        """Logits of the token that follows the last one."""
        stream = self.embed(tokens) + self.W_pos[: tokens.shape[1]]
        for layer in self.layers:
            stream = stream + layer(stream)
        return cast(Tensor, self.unembed(stream[:, -1]))
