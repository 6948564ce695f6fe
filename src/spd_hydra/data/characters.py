"""Tokens that are parts of characters: names for them, and the characters that several make together."""

import codecs
import contextlib
import re
from collections.abc import Sequence

_NAME = re.compile(r"⟨((?:[0-9A-F]{2} ?)+)⟩")
_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")
# How byte-level tokenizers write bytes: those that print as themselves, the others from U+0100 on.
_PRINTED = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in set(_PRINTED)]
_BYTE_LEVEL = {chr(byte): byte for byte in _PRINTED} | {chr(256 + n): byte for n, byte in enumerate(_OTHERS)}


def name_of_bytes(piece: str) -> str | None:
    """`⟨E6 97⟩` for a piece of a vocabulary that stands for these bytes and for no whole characters.

    Args:
        piece: as the vocabulary has it, of a byte-level tokenizer or of one that falls back to bytes.
    """
    if found := _FALLBACK.fullmatch(piece):
        data = bytes.fromhex(found[1])
    elif all(character in _BYTE_LEVEL for character in piece):
        data = bytes(_BYTE_LEVEL[character] for character in piece)
    else:
        return None
    try:
        data.decode()
    except UnicodeDecodeError:
        return f"⟨{data.hex(' ').upper()}⟩"
    return None


def completed(names: Sequence[str]) -> list[str]:
    """Names of the tokens of a text, in which what completes a character is shown as that character.

    Those before it that begin the character keep the names of their bytes.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    found = []
    for name in names:
        if (part := _NAME.fullmatch(name)) is None:
            decoder.reset()
            found.append(name)
            continue
        data = bytes.fromhex(part[1])
        try:
            text = decoder.decode(data)
        except UnicodeDecodeError:  # what was begun is not gone on with; perhaps another one begins
            decoder.reset()
            with contextlib.suppress(UnicodeDecodeError):
                decoder.decode(data)
            text = ""
        found.append(text or name)
    return found
