"""Text as rows of tokens: from the hub, from files, or from a saved dataset; tokenised once, then cached."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from spd_hydra.data.base import Batches, DataSource
from spd_hydra.data.packing import Document, Layout, is_held_out
from spd_hydra.data.streamed import StreamedBatches
from spd_hydra.data.text_source import TextSource, TextUnit, find_source
from spd_hydra.data.token_batches import TokenBatches
from spd_hydra.data.token_store import HELD_OUT, TRAIN, TokenStore, open_or_make, write_store
from spd_hydra.data.tokenizing import Reader, make_reader, tokenizer_commit
from spd_hydra.model.base import TargetSpec
from spd_hydra.section import ConfigError, Problem, kind_of, option, register

_SHUFFLED = 1000  # documents of a stream among which the next one is chosen
_FORMAT = 1  # part of the digest: raise it when the same text gives other rows


@register("data", "tokens")
@dataclasses.dataclass(kw_only=True)
class Tokens(DataSource):
    """Documents, tokenised with the target's tokenizer, concatenated and cut into rows of equal length."""

    name: str = option(
        help="id on the hub, or local: a file or folder of text, json, jsonl, csv or parquet, a pattern "
        "with *, or what datasets saved to disk"
    )
    config_name: str | None = option(None, "which configuration of a dataset on the hub")
    revision: str | None = option(None, "branch, tag or commit of a dataset on the hub; null: main")
    split: str = option("train", "what to train on; parts as datasets has them, e.g. train[:10%]")
    eval_split: str | None = option(None, "what to evaluate on; null: a share of `split`, see eval_fraction")
    eval_fraction: float = option(
        0.05, "share of the documents that is held out where there is no eval_split", gt=0, lt=1
    )
    text_column: str | None = option(None, "column with the text; null: the only one with text, or `text`")
    token_column: str | None = option(None, "column with token ids, for data that are tokenised already")
    text_unit: TextUnit = option(TextUnit.paragraph, "documents of text files: paragraph | line | file")
    tokenizer: str | None = option(
        None, "hub id or directory of a tokenizer; null: the target's own, for a token_column none"
    )
    tokenizer_revision: str | None = option(
        None, "branch, tag or commit of `tokenizer` on the hub; null: main"
    )
    length: int = option(512, "tokens per row", ge=2)
    pack: bool = option(
        True, "concatenate documents and cut them into full rows; false: one document per row, cut or padded"
    )
    processes: int = option(1, "processes that tokenise", ge=1)
    streaming: bool = option(
        False, "read the text while training, without a cache; not exactly resumable, see StreamedBatches"
    )
    cache_dir: str = option("~/.cache/spd_hydra", "where tokens are kept; as the run's cache_dir")

    def problems(self) -> Iterator[Problem]:
        """Adds: text and tokens exclude each other, and a revision is that of a tokenizer on the hub."""
        yield from super().problems()
        if self.token_column is not None and self.text_column is not None:
            yield Problem(
                "token_column",
                f"got {self.token_column} beside text_column={self.text_column}; give one of them",
            )
        if self.tokenizer_revision is not None and self.tokenizer is None:
            yield Problem(
                "tokenizer_revision",
                f"got {self.tokenizer_revision} without data.tokenizer; name one, or leave it out: the "
                "target's own tokenizer is of model.revision",
            )

    def bind(self, target: TargetSpec) -> Batches:
        """The rows to train on.

        What takes time, reading and tokenising the text, waits until the first batch is drawn.

        Raises:
            ConfigError: the data, a column or the tokenizer cannot be found, or they do not fit the target.
        """
        return self._batches(target, TRAIN)

    def bind_eval(self, target: TargetSpec) -> Batches:
        """The held-out rows; no document of theirs is among those to train on."""
        return self._batches(target, HELD_OUT)

    def commits(self) -> dict[str, str]:
        """Those of a dataset and of a tokenizer that are named by their ids on the hub."""
        found = {"revision": self._find(self.split).commit}
        if self.tokenizer is not None:
            found["tokenizer_revision"] = tokenizer_commit(self.tokenizer, self.tokenizer_revision)
        return {field: commit for field, commit in found.items() if commit is not None}

    def prefetch(self, target: TargetSpec) -> list[str]:
        rows = self._plan(target)
        if self.streaming:
            return [f"data {self.name}: {rows.source.where}; streamed, so nothing is kept"]
        return [f"data {self.name}: {rows.source.where}", rows.open().describe()]

    def _batches(self, target: TargetSpec, part: str) -> Batches:
        rows = self._plan(target)
        if self.streaming:
            return rows.streamed(part)
        return TokenBatches(
            digest=rows.digest,
            part=part,
            length=self.length,
            padded=not self.pack,
            open_store=rows.open,
            load_tokenizer=rows.reader.tokenizer,
        )

    def _find(self, split: str, key: str = "data.split") -> TextSource:
        return find_source(
            self.name, self.config_name, self.revision, split=split, text_unit=self.text_unit, key=key
        )

    def _plan(self, target: TargetSpec) -> "_Rows":
        """Everything that can be known of the rows without reading the text."""
        vocab_size = target.vocab_size()
        if vocab_size is None:
            name = kind_of(type(target)) or type(target).__name__
            raise ConfigError(
                f"data: tokens cannot feed {name}, which takes none; choose a language model (model=hf "
                "model.name=…) or the data source made for this model"
            )
        require_length(self.length, target)
        with torch.device("cpu"):  # `datasets` makes tensors of its own, also while a model is built on meta
            source = self._find(self.split)
            held_out = None if self.eval_split is None else self._find(self.eval_split, "data.eval_split")
            columns = source.columns()
        reader = make_reader(
            columns,
            text_column=self.text_column,
            token_column=self.token_column,
            tokenizer=self.tokenizer or (None if self.token_column else target.tokenizer_name()),
            tokenizer_revision=self.tokenizer_revision if self.tokenizer else target.tokenizer_revision(),
            special_tokens=not self.pack,
            processes=self.processes,
        )
        layout = Layout(
            length=self.length, pack=self.pack, end=reader.end() if self.pack else None, vocab_size=vocab_size
        )
        identity = [
            *(_FORMAT, source.identity, held_out.identity if held_out else self.eval_fraction),
            *(reader.identity(), dataclasses.asdict(layout)),
        ]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        directory = Path(self.cache_dir).expanduser() / "tokens" / digest
        return _Rows(digest, directory, source, held_out, reader, layout, self.eval_fraction)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """Rows in the cache, and how to make them."""

    digest: str
    directory: Path
    source: TextSource
    held_out: TextSource | None
    reader: Reader
    layout: Layout
    eval_fraction: float

    def open(self) -> TokenStore:
        return open_or_make(self.directory, self._make)

    def streamed(self, part: str) -> StreamedBatches:
        """The rows of a part as they come; held-out documents are left out of what is trained on by share."""
        source = self.source if part == TRAIN or self.held_out is None else self.held_out

        def documents(seed: int) -> Iterator[Document]:
            stream = source.stream()
            if part == TRAIN:
                stream = stream.shuffle(seed=seed, buffer_size=_SHUFFLED)
            for one in self.reader.streamed(stream):
                own = TRAIN if not is_held_out(one, self.eval_fraction) else HELD_OUT
                if self.held_out is not None or own == part:
                    yield one

        return StreamedBatches(
            self.layout, documents, remember=part == HELD_OUT, load_tokenizer=self.reader.tokenizer
        )

    def _make(self, directory: Path) -> TokenStore:
        read = self.reader.documents
        documents = read(self.source.load(), directory / "train.arrow")
        held_out = None
        if self.held_out is not None:
            held_out = read(self.held_out.load(), directory / "eval.arrow")
        store = write_store(directory, self.layout, documents, held_out, self.eval_fraction)
        for path in directory.glob("*.arrow"):
            path.unlink()
        return store


def require_length(length: int, target: TargetSpec) -> None:
    """Refuse rows that are longer than what the target takes.

    Raises:
        ConfigError: says what it takes.
    """
    longest = target.context_length()
    if longest is not None and length > longest:
        raise ConfigError(
            f"data.length: got {length}, but the target takes at most {longest} tokens; set "
            f"data.length={longest} or less"
        )
