"""Text that every installation of Python carries: sources and documentation of its standard library."""

import dataclasses
import functools
import hashlib
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from spd_hydra.data.base import DataSource
from spd_hydra.data.packing import Document, Layout
from spd_hydra.data.token_batches import TokenBatches
from spd_hydra.data.token_store import HELD_OUT, TRAIN, TokenStore, open_or_make, rows_directory, write_store
from spd_hydra.model.base import TargetSpec
from spd_hydra.section import ConfigError, kind_of, option, register

_FORMAT = 1  # part of the digest: raise it when the same text gives other tokens
_PIECE = 2000  # characters, at least, of a document: few enough that both parts have pieces of most files
_END = "<|endoftext|>"
_SMALLEST = 257  # every byte, and the end of a document
_LEAST_CHARACTERS = 500_000


@register("data", "python_text")
@dataclasses.dataclass(kw_only=True)
class PythonText(DataSource):
    """The standard library's own text, with a tokenizer trained on it that has as many tokens as the target.

    Files are the modules directly in the library's directory, by name, and the documentation of the language
    that `help()` shows. Other versions of Python carry other text.
    """

    eval_fraction: float = option(0.05, "held-out share of the text, in pieces", gt=0, lt=1)
    cache_dir: str = option("~/.cache/spd_hydra", "where tokens are kept; as the run's cache_dir")

    def bind(self, target: TargetSpec) -> TokenBatches:
        """The training text, cut to the target's context.

        Raises:
            ConfigError: the target takes no tokens, or this Python has no sources.
        """
        return self._batches(target, TRAIN)

    def bind_eval(self, target: TargetSpec) -> TokenBatches:
        """The held-out text."""
        return self._batches(target, HELD_OUT)

    def prefetch(self, target: TargetSpec) -> list[str]:
        batches = self._batches(target, TRAIN)
        return [open_or_make(self._directory(batches.digest), self._make(target)).describe()]

    def _batches(self, target: TargetSpec, part: str) -> TokenBatches:
        vocab_size, length = _requirements(target)
        identity = [_FORMAT, _digest(), self.eval_fraction, vocab_size, length]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()

        def open_store() -> TokenStore:
            return open_or_make(self._directory(digest), self._make(target))

        return TokenBatches(
            digest=digest,
            part=part,
            length=length,
            padded=False,
            open_store=open_store,
            load_tokenizer=lambda: _load_tokenizer(open_store().directory),
        )

    def _directory(self, digest: str) -> Path:
        return rows_directory(self.cache_dir, digest)

    def _make(self, target: TargetSpec) -> "_Make":
        vocab_size, length = _requirements(target)
        return _Make(vocab_size, length, self.eval_fraction)


@dataclasses.dataclass(frozen=True)
class _Make:
    """Trains the tokenizer and writes the rows."""

    vocab_size: int
    length: int
    eval_fraction: float

    def __call__(self, directory: Path) -> TokenStore:
        pieces = list(text_pieces())
        tokenizer = trained_tokenizer(pieces, self.vocab_size)
        tokenizer.save(str(directory / "tokenizer.json"))
        encoded = tokenizer.encode_batch(pieces)
        documents: list[Document] = [np.array(one.ids, dtype=np.int32) for one in encoded]
        end = tokenizer.token_to_id(_END)
        layout = Layout(length=self.length, pack=True, end=end, vocab_size=self.vocab_size)
        return write_store(directory, layout, lambda: documents, None, self.eval_fraction)


def _requirements(target: TargetSpec) -> tuple[int, int]:
    """Number of tokens and length of a row for a target."""
    vocab_size, length = target.vocab_size(), target.context_length()
    if vocab_size is None or length is None or target.tokenizer_name() is not None:
        name = kind_of(type(target)) or type(target).__name__
        raise ConfigError(
            f"data: python_text cannot feed {name}; it is for small language models that are trained here "
            "(model=lm_tiny), others take data=tokens data.name=…"
        )
    if vocab_size < _SMALLEST:
        raise ConfigError(
            f"model.vocabulary: got {vocab_size}, must be ≥ {_SMALLEST}: the tokenizer has every byte"
        )
    return vocab_size, length


def text_pieces() -> Iterator[str]:
    """The text in pieces of whole paragraphs, of about 2000 characters, in a fixed order."""
    for path in _files():
        piece = ""
        for paragraph in path.read_text(encoding="utf-8", errors="replace").split("\n\n"):
            piece += paragraph + "\n\n"
            if len(piece) >= _PIECE:
                yield piece
                piece = ""
        if piece.strip():
            yield piece


def _files() -> list[Path]:
    """The modules of the standard library, but for private ones, which differ between machines.

    Raises:
        ConfigError: this Python was installed without them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in library.glob("*.py") if not path.name.startswith("_"))
    topics = library / "pydoc_data" / "topics.py"
    files += [topics] if topics.exists() else []
    size = sum(path.stat().st_size for path in files)
    if size < _LEAST_CHARACTERS:
        raise ConfigError(
            f"data: python_text needs the sources of Python's standard library, but {library} has {size:,} "
            "bytes of them; use another installation of Python, or data=tokens data.name=<files of text>"
        )
    return files


@functools.cache
def _digest() -> str:
    """Of the whole text."""
    digest = hashlib.sha256()
    for path in _files():
        digest.update(path.read_bytes())
    return digest.hexdigest()


def trained_tokenizer(pieces: list[str], vocab_size: int) -> Any:
    """A byte-level BPE tokenizer trained on pieces of text; the same pieces give the same tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer, length=len(pieces))
    return tokenizer


def _load_tokenizer(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    path = str(directory / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=path)  # type: ignore[no-untyped-call]
