"""Text as rows of tokens: from the hub, from files, or from a saved dataset; tokenised once, then cached."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator

import torch

from spd_hydra.data.base import Batches, DataSource
from spd_hydra.data.columns import Columns, Holds, token_column_among
from spd_hydra.data.find_text import find_text, whole_name
from spd_hydra.data.masking import USUAL, masked
from spd_hydra.data.packing import Layout
from spd_hydra.data.text_source import TextUnit, Wanted
from spd_hydra.data.token_batches import TokenBatches
from spd_hydra.data.token_rows import TokenRows
from spd_hydra.data.token_store import HELD_OUT, TRAIN, rows_directory
from spd_hydra.data.tokenizing import make_reader, tokenizer_commit
from spd_hydra.model import hub
from spd_hydra.model.base import TargetSpec
from spd_hydra.section import ConfigError, Problem, kind_of, option, register

_LENGTH = 512  # of rows, where the target takes as many
_FORMAT = 2  # part of the digest: raise it when the same text gives other rows


@register("data", "tokens")
@dataclasses.dataclass(kw_only=True)
class Tokens(DataSource):
    """Documents, tokenised with the target's tokenizer, concatenated and cut into rows of equal length."""

    name: str = option(
        help="id on the hub, or local: a file or folder of text, json, jsonl, csv or parquet, a pattern "
        "with *, or what datasets saved to disk; names of files in a folder tell splits, as on the hub"
    )
    config_name: str | None = option(None, "which configuration of a dataset that has several")
    revision: str | None = option(None, "branch, tag or commit of a dataset on the hub; null: main")
    split: str = option(
        "train",
        "what to train on; parts as datasets has them, e.g. 'data.split=\"train[:10%]\"' with both quotes",
    )
    eval_split: str | None = option(
        None,
        "what to evaluate on; null: the only split of eval_name, or a share of `split`, see eval_fraction",
    )
    eval_name: str | None = option(
        None, "what to evaluate on, if it is not in `name`: an id or files, as there"
    )
    eval_config_name: str | None = option(None, "which configuration of eval_name")
    eval_revision: str | None = option(None, "branch, tag or commit of eval_name on the hub; null: main")
    eval_fraction: float = option(
        0.05, "share of the documents that is held out where no others are named", gt=0, lt=1
    )
    text_column: str | None = option(None, "column with the text; null: the only one with text, or `text`")
    token_column: str | None = option(
        None, "column with token ids; null: without text input_ids, tokens or token_ids, else none"
    )
    text_unit: TextUnit = option(
        TextUnit.paragraph,
        "what of text files is one text: paragraph | line | file; packed paragraphs of a file stay joined by "
        "their blank lines, and a share of them can be held out",
    )
    tokenizer: str | None = option(
        None, "hub id or directory of a tokenizer; null: the target's own, for a token_column none"
    )
    tokenizer_revision: str | None = option(
        None, "branch, tag or commit of `tokenizer` on the hub; null: main"
    )
    length: int | None = option(
        None, f"tokens per row; null: {_LENGTH}, or as many as the target takes if those are fewer", ge=2
    )
    pack: bool = option(
        True, "concatenate documents and cut them into full rows; false: one document per row, cut or padded"
    )
    mask_fraction: float | None = option(
        None,
        "share of the tokens that the tokenizer's mask token replaces; null: 0.15 for texts of a masked "
        "language model, else 0",
        ge=0,
        lt=1,
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
        for field in ("eval_config_name", "eval_revision"):
            if getattr(self, field) is not None and self.eval_name is None:
                yield Problem(
                    field, f"got {getattr(self, field)} without data.eval_name; name one, or leave it out"
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
        found = {"revision": find_text(self._wanted()).commit}
        if self.eval_name is not None:
            found["eval_revision"] = find_text(self._wanted_for_eval()).commit
        if self.tokenizer is not None:
            found["tokenizer_revision"] = tokenizer_commit(self.tokenizer, self.tokenizer_revision)
        return {field: commit for field, commit in found.items() if commit is not None}

    def names(self) -> dict[str, str]:
        """Those of the data, of others to evaluate on, and of a tokenizer of their own."""
        found = {"name": whole_name(self.name)}
        if self.eval_name is not None:
            found["eval_name"] = whole_name(self.eval_name)
        if self.tokenizer is not None:
            found["tokenizer"] = hub.whole_name(self.tokenizer)
        return found

    def notes(self) -> list[str]:
        """Adds: what does not hold of data that are streamed."""
        if not self.streaming:
            return []
        found = (
            "data.streaming: not exactly resumable; a run that is resumed reads the text again, and sees the "
            "same rows only if the source gives the same text in the same order"
        )
        if self._has_own_eval:
            found += "; whether documents to evaluate on are also trained on is not checked"
        return [found]

    def prefetch(self, target: TargetSpec) -> list[str]:
        rows = self._plan(target)
        if self.streaming:
            return [f"data {self.name}: {rows.source.where}; streamed, so nothing is kept"]
        store = rows.open()
        return [f"data {self.name}: {rows.source.where}", store.describe(), *store.notes()]

    def _batches(self, target: TargetSpec, part: str) -> Batches:
        rows = self._plan(target)
        padding = self._unmasked_padding(target, rows, part)
        batches = rows.streamed(part, padding) if self.streaming else self._stored(rows, part, padding)
        fraction = self.mask_fraction
        if fraction is None:
            fraction = USUAL if target.fills_masks() and not rows.reader.tokenised else 0.0
        if not fraction:
            return batches
        return masked(batches, fraction, rows.reader.tokenizer(), rows.layout.vocab_size)

    def _unmasked_padding(self, target: TargetSpec, rows: TokenRows, part: str) -> frozenset[int]:
        """Ids that would be padding, in lists of tokens beside which nothing says where that is."""
        own = part == HELD_OUT and rows.held_out is not None
        if not rows.reader.tokenised or rows.masks[own] is not None:
            return frozenset()
        known = {target.padding_token(), getattr(rows.reader.tokenizer(), "pad_token_id", None)}
        return frozenset(token for token in known if token is not None)

    def _stored(self, rows: TokenRows, part: str, padding: frozenset[int]) -> TokenBatches:
        return TokenBatches(
            digest=rows.digest,
            part=part,
            length=rows.layout.length,
            padded=not self.pack,
            padding=padding,
            open_store=rows.open,
            load_tokenizer=rows.reader.tokenizer,
        )

    @property
    def _has_own_eval(self) -> bool:
        return self.eval_split is not None or self.eval_name is not None

    def _wanted(self) -> Wanted:
        return Wanted(
            name=self.name,
            config_name=self.config_name,
            revision=self.revision,
            split=self.split,
            text_unit=self.text_unit,
            joined=self.pack,
        )

    def _wanted_for_eval(self) -> Wanted:
        of_training = dataclasses.replace(self._wanted(), split=self.eval_split, split_key="data.eval_split")
        if self.eval_name is None:
            return of_training
        return dataclasses.replace(
            of_training,
            name=self.eval_name,
            config_name=self.eval_config_name,
            revision=self.eval_revision,
            prefix="eval_",
        )

    def _plan(self, target: TargetSpec) -> TokenRows:
        """Everything that can be known of the rows without reading the text."""
        vocab_size = target.vocab_size()
        if vocab_size is None:
            kind = kind_of(type(target)) or type(target).__name__
            name = target.names().get("name")
            which = f"{name} ({kind})" if name else kind
            raise ConfigError(
                f"data: tokens cannot feed {which}, which takes none; choose a language model (model=hf "
                "model.name=…) or the data source made for this model"
            )
        length = self._length(target)
        with torch.device("cpu"):  # `datasets` makes tensors of its own, also while a model is built on meta
            source = find_text(self._wanted())
            held_out = find_text(self._wanted_for_eval()) if self._has_own_eval else None
            columns, others = source.columns(), held_out.columns() if held_out else None
            token_column = self.token_column
            if token_column is None and self.text_column is None:
                token_column = token_column_among(columns)
        reader = make_reader(
            {name: holds is Holds.text for name, holds in columns.items()},
            text_column=self.text_column,
            token_column=token_column,
            tokenizer=self.tokenizer or (None if token_column else target.tokenizer_name()),
            tokenizer_revision=self.tokenizer_revision if self.tokenizer else target.tokenizer_revision(),
            trusts_code=self.tokenizer is None and target.trusts_tokenizer_code(),
            special_tokens=not self.pack,
            processes=self.processes,
        )
        reader.require(columns)
        if others is not None:
            self._require_same(reader.column, columns, others)
        begin, end = reader.around(vocab_size) if self.pack else ((), None)
        layout = Layout(length=length, pack=self.pack, begin=begin, end=end, vocab_size=vocab_size)
        masks = reader.mask(columns), reader.mask(others or {})
        identity = [
            *(_FORMAT, source.identity, held_out.identity if held_out else self.eval_fraction),
            *(reader.identity(), masks, dataclasses.asdict(layout)),
        ]
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return TokenRows(
            digest=digest,
            directory=rows_directory(self.cache_dir, digest),
            source=source,
            held_out=held_out,
            reader=reader,
            masks=masks,
            layout=layout,
            eval_fraction=self.eval_fraction,
        )

    def _length(self, target: TargetSpec) -> int:
        longest = target.context_length()
        if self.length is None:
            return _LENGTH if longest is None else min(_LENGTH, longest)
        require_length(self.length, target)
        return self.length

    def _require_same(self, column: str, columns: Columns, others: Columns) -> None:
        """Refuse data to evaluate on that lack the column that is read, or have something else in it."""
        if column not in others or len({columns[column], others[column]} - {Holds.unknown}) > 1:
            key = "eval_split" if self.eval_name is None else "eval_name"
            found = f"with {others[column].value} in" if column in others else "without"
            raise ConfigError(
                f"data.{key}: got {getattr(self, key)}, {found} the column {column}, from which "
                f"{columns[column].value} is trained on; it has {', '.join(others)}"
            )


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
