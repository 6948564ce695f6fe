"""A small language model that is trained here: real text, no download."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from spd_hydra.model.tokens_in import TokensIn, adapt
from spd_hydra.model.training import TrainableTarget
from spd_hydra.section import Problem, option, register

_INITIAL = 0.02  # standard deviation of initial weights, as transformers has it


@register("model", "lm_tiny")
@dataclasses.dataclass(kw_only=True)
class TinyLM(TrainableTarget):
    """A causal language model shaped like Llama: RMS norms, rotary attention, gated MLPs, tied embedding."""

    vocabulary: int = option(512, "number of tokens; data=lm_tiny trains a tokenizer of as many", ge=257)
    context: int = option(64, "tokens that it takes at once", ge=2)
    d_model: int = option(64, "width of the residual stream", ge=2)
    d_mlp: int = option(192, "neurons of each MLP", ge=1)
    n_layers: int = option(2, "blocks of attention and MLP", ge=1)
    n_heads: int = option(4, "attention heads of each block", ge=1)

    held_out_rows: ClassVar[int] = 1024

    def problems(self) -> Iterator[Problem]:
        """Adds: heads share the stream, and rotary positions turn pairs of numbers."""
        yield from super().problems()
        if self.d_model % (2 * self.n_heads):
            yield Problem(
                "d_model", f"got {self.d_model}, must be a multiple of 2 * n_heads = {2 * self.n_heads}"
            )

    def build(self, generator: torch.Generator) -> TokensIn:
        """Matrices ~ N(0, 0.02²), norms 1; the embedding is also the unembedding."""
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.d_model,
            intermediate_size=self.d_mlp,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        with torch.random.fork_rng(devices=[]):  # transformers draws from the global generator
            model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    values = torch.randn(parameter.shape, generator=generator, device="cpu")
                    parameter.copy_(_INITIAL * values)
        return adapt(model, "logits")

    def training_loss(self, module: nn.Module, batch: Int64[Tensor, "batch length"]) -> Float[Tensor, ""]:
        """Cross-entropy of the next token in nats, mean over all positions but the last of each row."""
        logits = module(batch)[:, :-1]
        return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def vocab_size(self) -> int:
        return self.vocabulary

    def context_length(self) -> int:
        return self.context

    def predicts_next_token(self) -> bool:
        return True
