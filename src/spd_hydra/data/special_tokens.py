"""What a tokenizer puts around a text by itself."""

from typing import Any

_SHORT_TEXTS = ("a", "A", "1")  # not every vocabulary has letters


def begin_of(tokenizer: Any) -> tuple[int, ...]:
    """The ids in front of a text, such as <bos> or [CLS]: what is there only with special tokens."""
    for text in _SHORT_TEXTS:
        bare = list(tokenizer.encode(text, add_special_tokens=False))
        if not bare:  # the vocabulary has nothing for it
            continue
        whole = list(tokenizer.encode(text))
        for place in range(len(whole) - len(bare) + 1):
            if whole[place : place + len(bare)] == bare:
                return tuple(whole[:place])
    return ()


def end_of(tokenizer: Any) -> int | None:
    """The id behind a text that others follow: the end of a text, or the token that separates texts."""
    end: int | None = tokenizer.eos_token_id
    separator: int | None = tokenizer.sep_token_id
    return separator if end is None else end
