"""From a dataset to documents of token ids: tokenised by many processes, or read as they are."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spd_hydra.data.characters import name_of_bytes
from spd_hydra.data.columns import Columns, Holds, columns_of, kind_of_value
from spd_hydra.data.packing import Document, writing
from spd_hydra.data.special_tokens import begin_of, end_of
from spd_hydra.data.text_pieces import CONTINUES
from spd_hydra.data.text_source import first_line
from spd_hydra.data.token_lists import mask_among, null_among, read_lists, read_texts, texts
from spd_hydra.model import hub
from spd_hydra.section import ConfigError
from spd_hydra.stop import kept_from_children

_TOKENS = "tokens"
_KEYS = hub.Keys("data.tokenizer", "data.tokenizer_revision")
_NO_CHARACTER = "\ufffd"  # what decoders write in place of bytes that are none
_FEW = 16  # documents read at once from a stream
_SET_BY_USE = ("truncation", "padding")  # of a tokenizer's state; here texts are whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """How documents are read from a dataset.

    Attributes:
        column: holds texts, or token ids where they are `tokenised` already.
        name: of the tokenizer; None: nothing has to be tokenised or decoded.
        revision: of the tokenizer on the hub; None: main.
        trusts_code: whether Python code that comes with the tokenizer may run.
        special_tokens: whether a text begins and ends as the tokenizer would have it.
        processes: that tokenise.
    """

    column: str
    tokenised: bool
    name: str | None
    revision: str | None
    trusts_code: bool
    special_tokens: bool
    processes: int

    def tokenizer(self) -> Any:
        """The tokenizer, if there is one."""
        return None if self.name is None else _tokenizer(self.name, self.revision, self.trusts_code)

    def around(self, vocab_size: int) -> tuple[tuple[int, ...], int | None]:
        """The ids in front of every document of packed text, and the one behind it.

        Documents that are tokens already have what they need. Where texts begin with what ends them, as
        those of OPT, one such token between two of them is enough.

        Raises:
            ConfigError: one is not below `vocab_size`, so none of the target's.
        """
        if self.tokenised:
            return (), None
        begin, end = begin_of(self.tokenizer()), end_of(self.tokenizer())
        start, advice = f"data.tokenizer: {self.name}", "choose a tokenizer made for the target"
        allowed = f"but the target takes ids below {vocab_size}"
        if begin and max(begin) >= vocab_size:
            raise ConfigError(f"{start} begins documents with token id {max(begin)}, {allowed}; {advice}")
        if end is not None and end >= vocab_size:
            raise ConfigError(
                f"{start} ends documents with token id {end}, {allowed}; {advice}, or data.pack=false, which "
                "puts no such token between documents"
            )
        return begin, None if begin[:1] == (end,) else end

    def identity(self) -> list[Any]:
        """Everything about reading that the ids depend on."""
        tokenizer = self.tokenizer()  # also of ids that it only shows: if it is missing, that is told now
        return [self.column, None if self.tokenised else _digest(tokenizer), self.special_tokens]

    def mask(self, columns: Iterable[str]) -> str | None:
        """The column that tells padding from tokens, of data with these columns; None: there is none."""
        return mask_among(columns, self.column) if self.tokenised else None

    def documents(self, dataset: Any, cache_file: Path) -> Callable[[], Iterator[Document]]:
        """New iterations over the documents of a dataset, which is tokenised now.

        Args:
            dataset: of the library `datasets`.
            cache_file: where its tokens may be kept meanwhile.

        Raises:
            ConfigError: the column does not hold what it is read for, or the file cannot be written.
        """
        self.require(columns_of(dataset.features))
        if not self.tokenised:
            return functools.partial(read_lists, self._tokenised(dataset, cache_file), _TOKENS, CONTINUES)
        return functools.partial(read_texts, dataset, self.column, self.mask(dataset.column_names))

    def streamed(self, dataset: Any, where: str, mask: str | None = None) -> Iterator[Document]:
        """The documents of a dataset that is read on the way from somewhere.

        Args:
            dataset: of the library `datasets`.
            where: for people.
            mask: the column that `mask` finds among those of the dataset, which itself may not know them.
        """
        names = [self.column] if mask is None else [self.column, mask]
        for batch in _batches(dataset.select_columns(names).with_format(None), where):
            self._require_values(batch[self.column])
            ids = batch[self.column] if self.tokenised else self._tokenise()(batch)[_TOKENS]
            lists = (np.array(tokens or [], dtype=np.int64) for tokens in ids)
            yield from texts(lists, batch[mask] if mask else None, self.column, in_order=False)

    def require(self, columns: Columns) -> None:
        """Refuse a column that holds something else than it is read for.

        Raises:
            ConfigError: it does; names those that would do.
        """
        wanted = Holds.whole_numbers if self.tokenised else Holds.text
        if columns[self.column] in {wanted, Holds.unknown}:
            return
        key, what, other = "text_column", "text", "data.token_column for lists of token ids"
        if self.tokenised:
            key, what, other = "token_column", "lists of token ids", "data.text_column for text"
        fitting = [name for name, found in columns.items() if found is wanted]
        instead = f"one of {', '.join(fitting)}" if fitting else "another column"
        raise ConfigError(f"data.{key}: got {self.column}, which holds no {what}; name {instead}, or {other}")

    def _require_values(self, values: Sequence[Any]) -> None:
        """As `require`, for a stream, whose features may not be known; a null has no tokens."""
        for value in values:
            if self.tokenised and isinstance(value, list) and None in value:
                raise null_among(self.column)
            self.require({self.column: kind_of_value(value)})

    def _tokenise(self) -> Callable[[dict[str, list[str]]], dict[str, list[list[int]]]]:
        return functools.partial(
            _tokenise, tokenizer=self.tokenizer(), column=self.column, special_tokens=self.special_tokens
        )

    def _tokenised(self, dataset: Any, cache_file: Path) -> Any:
        from datasets import Features, List, Value

        features = {_TOKENS: List(Value("int32"))}
        kept = {CONTINUES} & set(dataset.column_names)
        with kept_from_children(), writing(cache_file):
            return dataset.map(
                self._tokenise(),
                batched=True,
                num_proc=self.processes if self.processes > 1 else None,
                remove_columns=[name for name in dataset.column_names if name not in kept],
                features=Features(features | dict.fromkeys(kept, Value("bool"))),
                cache_file_name=str(cache_file),
                desc="tokenising",
            )


def make_reader(
    columns: Mapping[str, bool],
    *,
    text_column: str | None,
    token_column: str | None,
    tokenizer: str | None,
    tokenizer_revision: str | None = None,
    trusts_code: bool = False,
    special_tokens: bool,
    processes: int,
) -> Reader:
    """Find the column to read and the tokenizer for it.

    Args:
        columns: of the dataset, with whether they hold text.
        trusts_code: whether Python code that comes with the tokenizer may run.

    Raises:
        ConfigError: there is no such column, or no tokenizer.
    """
    if token_column is not None:
        _require_column("token_column", token_column, columns)
        if columns[token_column]:
            raise ConfigError(
                f"data.token_column: got {token_column}, which holds text and no token ids; name it as "
                "data.text_column"
            )
    elif text_column is not None:
        _require_column("text_column", text_column, columns)
    else:
        texts = [name for name, is_text in columns.items() if is_text]
        text_column = "text" if "text" in texts else texts[0] if len(texts) == 1 else None
        if text_column is None and texts:
            raise ConfigError(
                f"data.text_column: got null, and more than one column holds text; name one of "
                f"{', '.join(texts)}, or data.token_column for token ids"
            )
        if text_column is None:
            raise ConfigError(
                f"data.text_column: got null, and no column holds text, of {', '.join(columns)}; if one has "
                "strings further on, name it, and one of lists of token ids as data.token_column; messages "
                "and other records have to be made into a column of strings first"
            )
    if tokenizer is None and token_column is None:
        raise ConfigError(
            "data.tokenizer: got null, and the target has none of its own; name one, or data.token_column "
            "for data that are tokenised already"
        )
    return Reader(
        column=token_column or text_column or "",
        tokenised=token_column is not None,
        name=tokenizer,
        revision=tokenizer_revision,
        trusts_code=trusts_code,
        special_tokens=special_tokens,
        processes=processes,
    )


def _require_column(key: str, name: str, columns: Mapping[str, bool]) -> None:
    if name not in columns:
        raise ConfigError(
            f"data.{key}: got {name}, which the data do not have; name one of {', '.join(columns)}"
        )


def _batches(dataset: Any, where: str) -> Iterator[dict[str, list[Any]]]:
    from datasets.exceptions import DatasetGenerationError

    try:
        yield from dataset.iter(_FEW)
    except (ValueError, DatasetGenerationError) as error:  # of several libraries, about what they read
        raise ConfigError(f"data: {where} cannot be read: {first_line(error)}") from error


def _tokenise(
    batch: dict[str, list[str]], *, tokenizer: Any, column: str, special_tokens: bool
) -> dict[str, list[list[int]]]:
    texts = [text or "" for text in batch[column]]
    ids = tokenizer(texts, add_special_tokens=special_tokens, verbose=False)["input_ids"]
    return {_TOKENS: [own if text else [] for text, own in zip(texts, ids, strict=True)]}


def _tokenizer(name: str, revision: str | None, trusts_code: bool) -> Any:
    return _loaded(name, hub.directory(name, revision, hub.TOKENIZER, _KEYS).absolute(), trusts_code)


@functools.cache
def _loaded(name: str, directory: Path, trusts_code: bool) -> Any:
    """The tokenizer in a directory; named by a directory, it is not looked for on the hub."""
    from transformers import AutoTokenizer

    if trusts_code:
        hub.require_own_code(name, directory / "tokenizer_config.json", "model.trust_remote_code")
    try:  # unless told, transformers would ask whoever sits there whether code may run
        tokenizer: Any = AutoTokenizer.from_pretrained(str(directory), trust_remote_code=trusts_code)
    except Exception as error:  # of several libraries, all about reading it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"data.tokenizer: got {name}, which cannot be loaded from {directory}: {reason}"
        ) from error
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made up where there are no files
        raise ConfigError(f"data.tokenizer: got {name}, which has no {hub.NO_TOKENIZER}")
    return tokenizer


def tokenizer_commit(name: str, revision: str | None) -> str | None:
    """The commit of a tokenizer on the hub, which is fetched first if the cache lacks it; None: it is local.

    Raises:
        ConfigError: it cannot be found or reached.
    """
    return hub.commit_of(name, hub.directory(name, revision, hub.TOKENIZER, _KEYS))


def _digest(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        state = repr(sorted(tokenizer.get_vocab().items()))
    else:
        parts = json.loads(backend.to_str())
        state = json.dumps({name: part for name, part in parts.items() if name not in _SET_BY_USE})
    return hashlib.sha256(state.encode()).hexdigest()


def decoded(tokenizer: Any, ids: Sequence[int]) -> list[str] | None:
    """Each token as it reads in running text, with the space before it; None without a tokenizer.

    At the beginning of a text many tokenizers leave that space out, so each is read behind a letter. Part of
    a character, which is none by itself, has the name of its bytes.
    """
    if tokenizer is None:
        return None
    decode = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    letter = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = decode(letter)
    found = []
    for token in ids:
        text = decode([*letter, token]) if token >= 0 else before
        text = text.removeprefix(before) if text.startswith(before) else decode([token])
        is_part = _NO_CHARACTER in text and token >= 0
        found.append((is_part and name_of_bytes(tokenizer.convert_ids_to_tokens(token))) or text)
    return found
