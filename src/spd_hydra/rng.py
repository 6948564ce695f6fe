"""Random numbers that are a pure function of (key, position): no hidden state, same on every device.

A key is a pair of 32-bit words derived from (seed, purpose, step). A uniform number is a hash of
key, row and column. So any slice of a batch can be drawn on its own (a rank draws its rows), a
resumed run needs no generator state, and the draw is elementwise integer arithmetic that a
compiler fuses into the kernel that uses the numbers.
"""

import hashlib
import struct
import zlib

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

_FEISTEL_ROUNDS = 6


def key(seed: int, purpose: str, step: int = 0) -> Int32[Tensor, "2"]:
    """The key of one purpose at one step, on the CPU."""
    return torch.tensor(key_words(seed, purpose, step), dtype=torch.int32)


def key_words(seed: int, purpose: str, step: int = 0) -> list[int]:
    """The two words of `key`, for those who make one tensor of many keys."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{step}".encode(), digest_size=8).digest()
    return list(struct.unpack("<ii", digest))


def derived_seed(seed: int, purpose: str, number: int = 0) -> int:
    """A 63-bit seed for torch's own generators, or for the next try of something seeded."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, purpose: str) -> torch.Generator:
    """A CPU generator for initial weights, which are drawn once and then moved to the device."""
    return torch.Generator().manual_seed(derived_seed(seed, purpose))


def uniform(
    key: Int32[Tensor, "2"], rows: Int32[Tensor, "*positions"], columns: Int32[Tensor, " columns"]
) -> Float[Tensor, "*positions columns"]:
    """Independent draws from U[0, 1), one per row and column, in steps of 2^-24.

    Args:
        key: from `key`.
        rows: index of each position in the *global* batch; equal rows give equal numbers.
        columns: what each draw is for; equal columns give equal numbers (see `columns`).
    """
    # No constant multiples of an index here: a compiler that knows the index's range may take the
    # overflow of such a product as undefined behaviour and drop the loop. Seen with torch 2.13 and g++ 12.
    row_words = _mix(_mix(rows ^ key[0]) + key[1])
    column_words = _mix(_mix(columns ^ key[1]) + key[0])
    words = _mix(row_words[..., None] ^ column_words)
    return ((words >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def columns(purpose: str, number: int) -> Int32[Tensor, " number"]:
    """The columns of one purpose: they do not depend on what else is drawn with the same key."""
    start = zlib.crc32(purpose.encode())
    return torch.arange(start, start + number, dtype=torch.int64).to(torch.int32)


def permuted(
    key: Int32[Tensor, "2"], places: Int64[Tensor, "*any"], size: int, round: Int64[Tensor, "*any"]
) -> Int64[Tensor, "*any"]:
    """The images of places under a pseudo-random permutation of 0 … size - 1, one of each key and round.

    A Feistel network permutes the numbers of an even number of bits, the fewest that hold `size` of them; an
    image outside the range is permuted again until it lies inside, which is a permutation of the range.
    So an image is found alone, without a table of all.

    Args:
        key: from `key`.
        places: in [0, size).
        size: of the range, < 2^62.
        round: number of the permutation, for each place.
    """
    half = max((size - 1).bit_length() + 1, 2) // 2
    low = (1 << half) - 1
    seeds = [_mix(_mix(_word(round)) ^ key[number % 2]) + number for number in range(_FEISTEL_ROUNDS)]
    found, outside = places, torch.ones_like(places, dtype=torch.bool)
    while bool(outside.any()):
        left, right = found >> half, found & low
        for seed in seeds:
            left, right = right, left ^ (_mix(_mix(_word(right)) ^ seed).long() & low)
        found = torch.where(outside, (left << half) | right, found)
        outside = found >= size
    return found


def _word(number: Int64[Tensor, "*any"]) -> Int32[Tensor, "*any"]:
    """The low 32 bits of a number below 2^32."""
    return (((number & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000).to(torch.int32)


def _mix(word: Int32[Tensor, "*any"]) -> Int32[Tensor, "*any"]:
    """Bijective 32-bit mixer (multiply, xor-shift; constants by C. Wellons, public domain)."""
    word = (word ^ _shift_right(word, 16)) * 0x7FEB352D
    word = (word ^ _shift_right(word, 15)) * (0x846CA68B - 2**32)
    return word ^ _shift_right(word, 16)


def _shift_right(word: Int32[Tensor, "*any"], bits: int) -> Int32[Tensor, "*any"]:
    """Logical shift: torch's shift of signed words copies the sign bit."""
    return (word >> bits) & ((1 << (32 - bits)) - 1)
