"""Stub."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def local_ranks(number: int, command: Sequence[str], payload: bytes) -> Iterator[None]:
    """Stub."""
    raise NotImplementedError
    yield
