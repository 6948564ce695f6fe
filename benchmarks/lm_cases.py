"""Untrained language models and random tokens: what a step on them costs does not depend on their values."""

import dataclasses
from typing import Any, cast

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor, nn

from spd_hydra import rng
from spd_hydra.ci_fn.base import CausalImportanceFn
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.data.base import Batches, DataSource
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.loss.divergence import Divergence
from spd_hydra.model.base import TargetSpec


@dataclasses.dataclass(kw_only=True)
class LanguageModel(TargetSpec):
    """A causal language model of `transformers` with random weights."""

    family: str = "llama"
    layers: int = 2
    width: int = 128
    heads: int = 4
    vocabulary: int = 1024

    def build(self, generator: torch.Generator) -> nn.Module:
        module = _Logits(self._untrained())
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.dim() > 1:
                    fresh = torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5
                    parameter.copy_(fresh)
        return module

    def _untrained(self) -> nn.Module:
        import transformers

        if self.family == "gpt2":
            gpt2 = transformers.GPT2Config(
                vocab_size=self.vocabulary, n_embd=self.width, n_layer=self.layers, n_head=self.heads
            )
            return cast(nn.Module, transformers.GPT2LMHeadModel(gpt2))
        llama = transformers.LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
        )
        return cast(nn.Module, transformers.LlamaForCausalLM(llama))


class _Logits(nn.Module):
    """The model as a function from tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Int[Tensor, "batch length"]) -> Float[Tensor, "batch length vocabulary"]:
        # Given, because a tracer cannot follow how the model makes its own.
        length = tokens.shape[-1]
        causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device).tril()
        return cast(Tensor, self.model(input_ids=tokens, attention_mask=causal, use_cache=False).logits)


@dataclasses.dataclass(kw_only=True)
class RandomTokens(DataSource):
    """Tokens that are all equally likely."""

    length: int = 64

    def bind(self, target: TargetSpec) -> "RandomTokenBatches":
        return RandomTokenBatches(length=self.length, vocabulary=cast(Any, target).vocabulary)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomTokenBatches(Batches):
    """The stream of random tokens."""

    length: int
    vocabulary: int
    traceable = True

    def __call__(self, key: Int32[Tensor, "2"], rows: Int32[Tensor, " batch"]) -> Int[Tensor, "batch length"]:
        columns = torch.arange(self.length, dtype=torch.int32, device=rows.device)
        return (rng.uniform(key, rows, columns) * self.vocabulary).long()


LAYERS = {
    "llama": "model.model.layers.*.{module}",
    "gpt2": "model.transformer.h.*.{module}",
}
MLP = {"llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "gpt2": ("mlp.c_fc", "mlp.c_proj")}
ATTENTION = {
    "llama": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "gpt2": ("attn.c_attn", "attn.c_proj"),
}


def config(
    target: LanguageModel,
    *,
    C: int,
    length: int = 64,
    hidden: int = 64,
    overrides: tuple[str, ...] = (),
    ci_fn: CausalImportanceFn | None = None,
) -> RunConfig:
    """A run that decomposes every matrix of the blocks: all sites at once and one at a time, with KL.

    Args:
        target: the model.
        C: subcomponents of each matrix.
        length: tokens per row.
        hidden: width of the causal-importance functions, one for each site.
        overrides: of the configuration, for batch size, losses and precision.
        ci_fn: another causal-importance function.
    """
    plain = compose(["experiment=tms_5-2", "device=cpu", *overrides])
    modules = ATTENTION[target.family] + MLP[target.family]
    sites = {
        module.replace(".", "_"): SitePattern(pattern=LAYERS[target.family].format(module=module), C=C)
        for module in modules
    }
    return dataclasses.replace(
        plain,
        name=target.family,
        model=target,
        data=RandomTokens(length=length),
        decomposition=Decomposition(sites=sites),
        ci_fn=SharedMLPCausalImportance(hidden=[hidden]) if ci_fn is None else ci_fn,
        loss=dataclasses.replace(plain.loss, divergence=Divergence.kl),
    )
