"""Tokens as they read in running text, for the families of tokenizers that models come with."""

from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from spd_hydra.data.tokenizing import decoded

WORDS = "the cat sat playing."


def fast(model: Any, before: Any, decoder: Any, **special: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = before, decoder
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def numbered(pieces: Sequence[str]) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(pieces)}


def word_piece() -> PreTrainedTokenizerFast:
    """As BERT's."""
    pieces = ["[UNK]", "[SEP]", "a", "the", "cat", "sat", "play", "##ing", "##a", "."]
    model = models.WordPiece(numbered(pieces), unk_token="[UNK]")
    tokenizer = fast(model, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(), sep_token="[SEP]")
    tokenizer.backend_tokenizer.normalizer = normalizers.BertNormalizer()
    return tokenizer


def unigram() -> PreTrainedTokenizerFast:
    """As T5's."""
    pieces = ["<unk>", "</s>", "▁a", "▁the", "▁cat", "▁sat", "▁play", "ing", "a", "."]
    model = models.Unigram([(piece, -float(number)) for number, piece in enumerate(pieces)], unk_id=0)
    return fast(model, pre_tokenizers.Metaspace(), decoders.Metaspace(), eos_token="</s>", unk_token="<unk>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """As Llama 2's: no pre-tokenizer, and bytes for what has no piece."""
    letters = sorted({*"thecatsplying.a▁"})
    pieces = ["<unk>", "</s>", *letters, "<0xC3>", "<0xA9>"]
    vocabulary, merges = numbered(pieces), []
    for word in ("▁the", "▁cat", "▁sat", "▁play", "ing", "▁a"):
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary.setdefault(word[:end], len(vocabulary))
    model = models.BPE(vocabulary, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True)
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = fast(model, None, decoder, eos_token="</s>", unk_token="<unk>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2's; two bytes of é are Ã and © there."""
    pieces = ["<end>", *sorted({*"thecatsplying.Ġ"}), "Ã", "©"]
    vocabulary, merges = numbered(pieces), []
    for word in ("the", "Ġcat", "Ġsat", "Ġplay", "ing"):
        for end in range(2, len(word) + 1):
            merges.append((word[: end - 1], word[end - 1]))
            vocabulary.setdefault(word[:end], len(vocabulary))
    model = models.BPE(vocabulary, list(dict.fromkeys(merges)))
    before = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return fast(model, before, decoders.ByteLevel(), eos_token="<end>")


FAMILIES = {"WordPiece": word_piece, "unigram": unigram, "byte fallback": byte_fallback, "bytes": byte_level}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokens_of_a_text_read_as_the_text(family: str) -> None:
    tokenizer = FAMILIES[family]()
    ids = tokenizer.encode(WORDS, add_special_tokens=False)
    texts = decoded(tokenizer, ids)
    assert texts is not None
    # Where a text begins may have a space, which is not the text's.
    assert [texts[0].strip(), *texts[1:]] == ["the", " cat", " sat", " play", "ing", "."]


@pytest.mark.parametrize(
    ("family", "token", "text"),
    [
        ("WordPiece", "the", " the"),
        ("WordPiece", "##a", "a"),
        ("WordPiece", "[SEP]", " [SEP]"),
        ("unigram", "▁a", " a"),
        ("unigram", "a", "a"),
        ("unigram", "</s>", "</s>"),
        ("byte fallback", "▁", " "),
        ("byte fallback", "▁the", " the"),
        ("byte fallback", "<0xC3>", "⟨C3⟩"),
        ("bytes", "the", "the"),
        ("bytes", "Ġcat", " cat"),
        ("bytes", "©", "⟨A9⟩"),
        ("bytes", "<end>", "<end>"),
    ],
)
def test_a_token_has_the_space_that_stands_before_it(family: str, token: str, text: str) -> None:
    tokenizer = FAMILIES[family]()
    assert decoded(tokenizer, [tokenizer.get_vocab()[token], -1]) == [text, ""]


def test_a_vocabulary_without_letters_is_read_token_by_token() -> None:
    model = models.BPE({"1": 0, "2": 1}, [])
    tokenizer = fast(model, pre_tokenizers.Split("", "isolated"), decoders.Fuse())
    assert decoded(tokenizer, [1, 0, -1]) == ["2", "1", ""]


def test_without_a_tokenizer_there_are_no_texts() -> None:
    assert decoded(None, [0]) is None
