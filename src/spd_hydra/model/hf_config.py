"""Configurations of transformers: what they say of a model, and which models are refused for it."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from torch import nn

from spd_hydra.model import hub
from spd_hydra.section import ConfigError


def unusable(trusts_code: bool) -> tuple[type[Exception], ...]:
    """What transformers raises of a model that cannot be made; code that came with it may raise anything."""
    from huggingface_hub.errors import StrictDataclassError  # noqa: PLC0415 (imported where it is needed)

    # The last three come from values of a kind that nobody expected: "num_attention_heads": "4".
    known = (
        *(OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError, StrictDataclassError),
        *(AssertionError, TypeError, AttributeError),
    )
    return (Exception,) if trusts_code else known


def first_line(error: Exception) -> str:
    """What an error says first, or its name."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def untrusted(name: str, error: Exception) -> ConfigError | None:
    """What is said of a model that transformers refuses for Python code of its own; None: not for that."""
    if "argument `trust_remote_code=True`" not in str(error):
        return None
    commit = (
        "" if hub.is_local(name) else " and model.revision=<full commit hash>, the one that you have read"
    )
    return ConfigError(
        f"model.trust_remote_code: got false, but {name} comes with Python code of its own, which is not run "
        f"unasked; if you have read it and trust it, set model.trust_remote_code=true{commit}"
    )


def read(name: str, directory: Path, *, trusts_code: bool) -> Any:
    """The configuration in a directory.

    Args:
        name: what the user calls the model.
        directory: with its config.json.
        trusts_code: run Python code that comes with it.

    Raises:
        ConfigError: it cannot be read, or is that of a model with two inputs or with quantised weights.
    """
    from transformers import AutoConfig

    try:
        if trusts_code:
            hub.require_own_code(name, directory / "config.json", "model.trust_remote_code")
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trusts_code)
    except unusable(trusts_code) as error:
        raise untrusted(name, error) or ConfigError(
            f"model.name: got {name}, whose config.json cannot be used: {first_line(error)}"
        ) from error
    if config.is_encoder_decoder:
        raise ConfigError(
            f"model.name: got {name}, which takes two inputs, one for its encoder and one for its "
            "decoder; only models with one input can be decomposed"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"model.name: got {name}, which is quantised; give the checkpoint in full precision"
        )
    return without_kernels(config)


def restored(architecture: str) -> Any:
    """The configuration that was written as JSON, with numbers that JSON does not have, such as infinity."""
    from transformers import AutoConfig

    def number(found: dict[str, Any]) -> Any:  # transformers writes {"__float__": "Infinity"}
        return float(found["__float__"]) if found.keys() == {"__float__"} else found

    return without_kernels(AutoConfig.for_model(**json.loads(architecture, object_hook=number)))


def without_kernels(config: Any) -> Any:
    """A configuration that names no way of attention, here or below: a kernel on the hub would be code."""
    config._attn_implementation = None
    return config


def sees_what_follows(config: Any) -> bool:
    """Whether attention goes both ways: so in a model for masked tokens that is no decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    is_causal = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_causal


def classifies_at_the_end(config: Any) -> bool:
    """Whether a classifier reads the last token that is no padding: so in a causal language model."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def longest_text(config: Any, modules: Callable[[], Iterable[tuple[str, nn.Module]]]) -> int | None:
    """Most tokens that a model takes at once; None: there is no limit.

    Args:
        config: of what reads the text.
        modules: gives the model's modules by name, where they have to be looked at.
    """
    longest = cast("int | None", getattr(config, "max_position_embeddings", None))
    if longest is None or longest <= 0:  # -1 where there is no limit
        return None
    if padding_token(config) is None or getattr(config, "rope_parameters", None):
        return longest
    # A table of positions that has a row for padding, as RoBERTa's, counts from behind that row.
    rows = [
        module.padding_idx + 1
        for name, module in modules()
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None
    ]
    return longest - max(rows, default=0)


def padding_token(config: Any) -> int | None:
    """The token that stands for padding; some configurations have no such key, or one that is no token."""
    text_config = config.get_text_config()
    found: int | None = getattr(text_config, "pad_token_id", None)
    vocabulary = getattr(text_config, "vocab_size", None)
    if found is None or found < 0 or (vocabulary is not None and found >= vocabulary):
        return None
    return found


def tells_replaced_tokens(config: Any) -> bool:
    """Whether the head for pre-training says of each token whether it was replaced, as ELECTRA's."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_PRETRAINING_MAPPING_NAMES as HEADS

    # Those that learn several things at once call what they say of tokens `prediction_logits`, not `logits`.
    return HEADS.get(config.model_type, "").endswith("ForPreTraining")


def has_exclusive_classes(config: Any) -> bool:
    """Whether a classifier's outputs are logits of classes of which one is right.

    One output is a number, and several of `multi_label_classification` are a probability each.
    """
    problem = getattr(config, "problem_type", None)
    return config.num_labels > 1 and problem in {None, "single_label_classification"}
