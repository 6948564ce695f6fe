"""A transformers model as the method needs it: one tensor of token ids in, one tensor out."""

import functools
from typing import Any, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from spd_hydra.model import hf_config
from spd_hydra.section import ConfigError

_UNPADDED, _PADDED = "spd_hydra_unpadded", "spd_hydra_padded"
_SDPA = {"sdpa", _UNPADDED, _PADDED}


class TokensIn(nn.Module):
    """What `adapt` puts in front of a transformers model: its class is this one and the model's own.

    Attributes:
        output_path: which part of the model's output is returned.
        padded: whether tokens may be negative, which marks padding; see `expect_padding`.
        longest: most tokens that the model takes at once; None: there is no limit.
    """

    output_path: str
    padded: bool
    longest: int | None
    config: Any

    def __reduce_ex__(self, _: Any) -> tuple[Any, ...]:
        # The class is made while a program runs, so that no other would find it by its name.
        return _empty, (type(self).__mro__[2],), self.__dict__.copy()

    def forward(
        self, tokens: Int64[Tensor, "batch length"] | None = None, **as_transformers: Any
    ) -> Float[Tensor, "batch *rest"]:
        """The chosen output for these tokens.

        Args:
            tokens: ids; negative ones are padding, which no position attends to.
            as_transformers: without tokens, arguments and with them the output of transformers' own class, as
                its `generate` needs them.

        Raises:
            ConfigError: the model gives no output under `output_path`, or it is no tensor.
        """
        if tokens is None:
            return cast(Tensor, super().forward(**as_transformers))
        valid = tokens >= 0
        if self.padded:
            padding = hf_config.padding_token(self.config)
            tokens = torch.where(valid, tokens, 0 if padding is None else padding)
        # Always a mask: without one, transformers looks for packed texts in the values of the positions.
        output = super().forward(input_ids=tokens, attention_mask=valid.long())
        return _picked(output, self.output_path)

    def expect_padding(self, padded: bool) -> None:
        """Say whether batches may hold padding; without it causal attention needs no mask in memory."""
        self.padded = padded
        if self.config._attn_implementation in _SDPA:
            cast(Any, self).set_attn_implementation(_PADDED if padded else _UNPADDED)


def adapt(model: nn.Module, output: str) -> TokensIn:
    """Make a transformers model callable with one tensor of tokens; all paths of its modules stay.

    The model is changed in place: evaluation needs no cache of keys and values, and whether an attention
    mask is made must not depend on values, or the model could be neither traced nor run on the meta device.

    Args:
        model: a `PreTrainedModel` that takes `input_ids` and `attention_mask`.
        output: path into its output: `logits`, `last_hidden_state`, `0`, or with dots.
    """
    _register_attention()
    if getattr(model.config, "_experts_implementation", None) is not None:
        # The others read how many tokens an expert gets, or know the shapes of bfloat16 alone.
        cast(Any, model).set_experts_implementation("batched_mm")
    config: Any = model.config
    if getattr(config, "rescale_every", 0):
        # For half precision alone, RWKV divides matrices in place: those that copies share, more than once.
        config.rescale_every = 0
    model.__class__ = _class_for(cast(Any, type(model)))
    adapted = cast(TokensIn, model)
    for module in adapted.modules():
        if getattr(getattr(module, "config", None), "use_cache", False):
            cast(Any, module).config.use_cache = False
    adapted.output_path = output
    adapted.longest = hf_config.longest_text(config.get_text_config(), adapted.named_modules)
    adapted.expect_padding(padded=True)
    return adapted


@functools.cache
def _class_for(kind: type[nn.Module]) -> type[TokensIn]:
    return type(kind.__name__, (TokensIn, kind), {"__module__": kind.__module__})


def _empty(kind: type[nn.Module]) -> TokensIn:
    """A model without anything in it, into which a copy is put."""
    _register_attention()
    found = _class_for(cast(Any, kind))
    return found.__new__(found)


def _register_attention() -> None:
    """Register torch's attention twice, with masks that are made always, or only where causality is not all.

    Transformers' own choice between the two reads the values of the mask.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def padded(**arguments: Any) -> Tensor | None:
        skips = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        return sdpa_mask(**(arguments | skips))

    def unpadded(**arguments: Any) -> Tensor | None:
        return sdpa_mask(**(arguments | {"attention_mask": None}))

    for name, mask in ((_PADDED, padded), (_UNPADDED, unpadded)):
        AttentionInterface.register(name, sdpa_attention_forward)
        AttentionMaskInterface.register(name, mask)


def _picked(output: Any, path: str) -> Tensor:
    found = output
    for part in path.split("."):
        try:
            found = found[int(part)] if part.isdigit() else getattr(found, part)
        except (AttributeError, IndexError, KeyError, TypeError):
            found = None
    if not isinstance(found, Tensor):
        names = ", ".join(name for name, value in output.items() if isinstance(value, Tensor))
        raise ConfigError(f"model.output: got {path}, under which the model gives no tensor; it has {names}")
    return found
