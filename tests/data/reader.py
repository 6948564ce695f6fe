"""A target and a tokenizer for tests of text: one token for every byte."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from spd_hydra.model.base import TargetSpec
from spd_hydra.section import option

END = 256


@dataclasses.dataclass(kw_only=True)
class ReaderSpec(TargetSpec):
    """A target that takes tokens; it is never built."""

    vocabulary: int = option(257, "tokens")
    context: int = option(64, "most tokens at once")
    tokenizer: str | None = option(None, "its own tokenizer")

    def build(self, generator: torch.Generator) -> nn.Module:
        raise NotImplementedError

    def vocab_size(self) -> int:
        return self.vocabulary

    def tokenizer_name(self) -> str | None:
        return self.tokenizer

    def context_length(self) -> int:
        return self.context


def save_byte_tokenizer(directory: Path) -> Path:
    """A tokenizer in which letter n of Latin-1 is token n, and the end of a text is token 256."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(number): number for number in range(256)} | {"<end>": END}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(directory)
    return directory
