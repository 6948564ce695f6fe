"""Tiny models of transformers with random weights, saved as a user would have them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

VOCAB, LENGTH = 50, 12

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_GPT2: dict[str, Any] = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

MODELS: dict[str, tuple[str, Callable[[], Any]]] = {
    "gpt2": ("causal_lm", lambda: transformers.GPT2Config(**_GPT2)),
    "llama": ("causal_lm", lambda: transformers.LlamaConfig(**SMALL, num_key_value_heads=2)),
    "gpt_neox": ("causal_lm", lambda: transformers.GPTNeoXConfig(**SMALL)),
    "qwen2": ("causal_lm", lambda: transformers.Qwen2Config(**SMALL, num_key_value_heads=2)),
    "qwen3": ("causal_lm", lambda: transformers.Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
    "mixtral": (
        "causal_lm",
        lambda: transformers.MixtralConfig(
            **SMALL, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
        ),
    ),
    # Its MLPs take all positions as rows.
    "opt": (
        "causal_lm",
        lambda: transformers.OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=SMALL["hidden_size"]),
    ),
    # Its layers write the product down themselves, and read queries, keys and values from one matrix.
    "falcon": ("causal_lm", lambda: transformers.FalconConfig(**SMALL, alibi=False)),
    "roberta": ("masked_lm", lambda: transformers.RobertaConfig(**SMALL)),
    "bert": ("masked_lm", lambda: transformers.BertConfig(**SMALL)),
    "bert_classifier": (
        "sequence_classification",
        lambda: transformers.BertConfig(**(SMALL | {"num_labels": 3})),
    ),
    "gpt2_classifier": (
        "sequence_classification",
        lambda: transformers.GPT2Config(**(_GPT2 | {"num_labels": 3, "pad_token_id": 3})),
    ),
}
"""By name: the auto class of the configuration, and the transformers configuration."""

_AUTO = {
    "causal_lm": transformers.AutoModelForCausalLM,
    "masked_lm": transformers.AutoModelForMaskedLM,
    "sequence_classification": transformers.AutoModelForSequenceClassification,
}


def saved_model(name: str, directory: Path) -> nn.Module:
    """The model, as transformers made it, and a copy of it in a directory."""
    auto_class, config = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = _AUTO[auto_class].from_config(config())
        with torch.no_grad():  # what begins at zero or one would hide mistakes
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.eval().save_pretrained(directory)
    return model


def tokens(rows: int = 3, seed: int = 0) -> torch.Tensor:
    """Token ids that are no padding in any of these models."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB, (rows, LENGTH), generator=generator)


def padded_tokens() -> torch.Tensor:
    """Rows of which one is whole, one ends early, and one begins late."""
    found = tokens()
    found[1, 7:] = -1
    found[2, :4] = -1
    return found
