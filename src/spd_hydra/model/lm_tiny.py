"""A small language model, trained here: real text, no download."""

import dataclasses
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spd_hydra.model.training import TrainableTarget
from spd_hydra.section import Problem, option, register


class TokenLogits(nn.Module):
    """A causal language model of transformers as a function from token ids to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Int64[Tensor, "batch length"]) -> Float[Tensor, "batch length vocab"]:
        """Logits of the next token at every position."""
        logits: Tensor = self.model(input_ids=tokens.clamp(min=0), use_cache=False).logits
        return logits


@register("model", "lm_tiny")
@dataclasses.dataclass(kw_only=True)
class TinyLM(TrainableTarget):
    """A causal language model of Llama's architecture: RMS norms, rotary attention, gated MLPs, tied embedding."""

    vocabulary: int = option(1024, "number of tokens", ge=257)
    context: int = option(64, "tokens per row", ge=2)
    d_model: int = option(96, "width of the residual stream", ge=2)
    d_mlp: int = option(256, "neurons of an MLP", ge=1)
    n_layers: int = option(2, "number of blocks", ge=1)
    n_heads: int = option(4, "attention heads", ge=1)
    loss_rows: ClassVar[int] = 1024

    def build(self, generator: torch.Generator) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=0,
        )
        with torch.random.fork_rng(devices=[]):
            model: Any = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.ndim == 2:
                values = 0.02*torch.randn(parameter.shape, generator=generator)
                parameter.data = values
        return TokenLogits(model)

    def training_loss(self, module: nn.Module, batch: Int64[Tensor, "batch length"]) -> Float[Tensor, ""]:
        """Cross-entropy of the next token, in nats, mean over positions that have one."""
        logits = module(batch)[:, :-1]
        return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), ignore_index=-1)

    def vocab_size(self) -> int:
        return self.vocabulary

    def context_length(self) -> int:
        return self.context
