"""A text that is known but not read yet, and what is said where its parts are not as they were asked for."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from enum import Enum
from typing import Any

from spd_hydra.data.columns import Columns
from spd_hydra.model import hf_config
from spd_hydra.section import ConfigError


class TextUnit(Enum):
    """What one document of a text file is."""

    paragraph = "paragraph"
    line = "line"
    file = "file"


@dataclasses.dataclass(frozen=True)
class TextSource:
    """One split of a dataset that is known but not read yet.

    Attributes:
        identity: changes when its content does.
        where: for people.
        columns: what each of its columns holds.
        load: the whole split.
        stream: the split, read on the way.
        commit: on the hub; None: it is local.
        cut: what its documents are, where they were cut from files of text.
    """

    identity: str
    where: str
    columns: Callable[[], Columns]
    load: Callable[[], Any]
    stream: Callable[[], Any]
    commit: str | None = None
    cut: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a source is asked for, and the keys that asked.

    Attributes:
        name: id on the hub, path or pattern.
        config_name: of several configurations of a dataset; None: the only one, or its default.
        revision: on the hub; None: main.
        split: None: the only one there is.
        text_unit: documents of text files.
        joined: documents will be joined to one text.
        prefix: of the keys name, config_name and revision: empty, or `eval_`.
        split_key: the key of the split.
    """

    name: str
    config_name: str | None
    revision: str | None
    split: str | None
    text_unit: TextUnit
    joined: bool = False
    prefix: str = ""
    split_key: str = "data.split"

    def key(self, field: str) -> str:
        """What a user calls a field."""
        return f"data.{self.prefix}{field}"

    def chosen(self, known: Iterable[Any], where: str) -> str:
        """The split, which is one of those known or a part of one.

        Raises:
            ConfigError: it is not, or none was named and there are several.
        """
        names = [str(one) for one in known]
        if self.split is None and len(names) == 1:
            return names[0]
        if self.split is None:
            raise ConfigError(
                f"{self.split_key}: got null, but {where} has {', '.join(names)}; name one of them"
            )
        if not set(parts_of(self.split)) <= set(names):
            other = "; or name other data with data.eval_name" if self._may_be_elsewhere else ""
            raise ConfigError(
                f"{self.split_key}: got {self.split}, but {where} has {', '.join(names)}{other}"
            )
        return self.split

    @property
    def _may_be_elsewhere(self) -> bool:
        return self.split_key == "data.eval_split" and not self.prefix


def parts_of(split: str) -> list[str]:
    """The names in a split: train and test of `train[:10%]+test`."""
    return [part.partition("[")[0].strip() for part in split.split("+")]


def first_line(error: Exception) -> str:
    """What an error of a library says first, or its name."""
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, DatasetGenerationError) and isinstance(error.__cause__, Exception):
        error = error.__cause__  # the other one says only that there is one
    if isinstance(error, UnicodeError):
        return f"{error}; save it as UTF-8"
    return hf_config.first_line(error)


def shortened(names: list[str]) -> str:
    """The first of many names and the last."""
    shown = names if len(names) <= 3 else [*names[:2], "…", names[-1]]
    return ", ".join(shown) + (f" ({len(names)} files)" if len(names) > 3 else "")


def wrong_configuration(wanted: Wanted, error: Exception) -> ConfigError | None:
    """What `datasets` says of a configuration, in our words, with those there are; None: of something else.

    It tells of them only in the text of a ValueError.
    """
    found = re.search(r"(?:configs|Available|in the cache): (\[.*\]|.*)", str(error))
    if not isinstance(error, ValueError) or "onfig" not in str(error) or found is None:
        return None
    names = [name.strip(" '\"") for name in found[1].strip("[]").split(",")]
    return ConfigError(
        f"{wanted.key('config_name')}: got {wanted.config_name or 'null'}, but {wanted.name} has the "
        f"configurations {', '.join(names)}; name one of them"
    )
