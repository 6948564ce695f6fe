"""Parts of characters have names, and make characters together."""

import pytest
from tokenizers import pre_tokenizers

from spd_hydra.data.characters import completed, name_of_bytes

TEXT = "日本 né 🙂!"


def pieces_of(text: str) -> list[str]:
    """The characters by which a byte-level tokenizer writes the bytes of a text, as `tokenizers` has them."""
    before = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return list(before.pre_tokenize_str(text)[0][0])


def test_every_byte_is_named_as_the_tokenizer_writes_it() -> None:
    data = TEXT.encode()
    pieces = pieces_of(TEXT)
    assert len(pieces) == len(data)
    for piece, byte in zip(pieces, data, strict=True):
        expected = None if byte < 0x80 else f"⟨{byte:02X}⟩"
        assert name_of_bytes(piece) == name_of_bytes(f"<0x{byte:02X}>") == expected


@pytest.mark.parametrize(
    ("piece", "name"),
    [("Ġæ", "⟨20 E6⟩"), ("æĹ", "⟨E6 97⟩"), ("æĹ¥", None), ("▁the", None), ("the", None), ("日", None)],
)
def test_only_parts_of_characters_are_named_by_their_bytes(piece: str, name: str | None) -> None:
    assert name_of_bytes(piece) == name


def test_bytes_make_the_text_again() -> None:
    names = [name_of_bytes(piece) or piece for piece in pieces_of(TEXT)]
    shown = completed(names)
    assert len(shown) == len(names)
    read = [text for text in shown if not text.startswith("⟨")]
    assert "".join(read).replace("Ġ", " ") == TEXT


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["⟨E6 97⟩", "⟨A5 E6⟩", "⟨9C AC⟩"], ["⟨E6 97⟩", "日", "本"]),
        (["⟨A5⟩", "⟨E6⟩", "⟨97⟩", "⟨A5⟩"], ["⟨A5⟩", "⟨E6⟩", "⟨97⟩", "日"]),  # a context begins anywhere
        (["⟨E6⟩", " a", "⟨97⟩", "⟨A5⟩"], ["⟨E6⟩", " a", "⟨97⟩", "⟨A5⟩"]),
        (["⟨E6⟩", "⟨E6⟩", "⟨97⟩", "⟨A5⟩"], ["⟨E6⟩", "⟨E6⟩", "⟨97⟩", "日"]),
    ],
)
def test_only_bytes_that_follow_each_other_make_a_character(names: list[str], shown: list[str]) -> None:
    assert completed(names) == shown
