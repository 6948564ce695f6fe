"""Where the model and the text of a run are from: names, commits of a hub, and places that may change."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

from spd_hydra.config import RunConfig
from spd_hydra.data.base import DataSource
from spd_hydra.data.tokens import Tokens
from spd_hydra.model.base import TargetSpec
from spd_hydra.model.hf import HuggingFace
from spd_hydra.model.users_code import is_users
from spd_hydra.section import ConfigError

_COMMIT = re.compile(r"[0-9a-f]{40}")

_OF_THE_MODEL = ("model.name", "model.revision")
_OF_TEXT = (
    "data.name",
    "data.revision",
    "data.eval_name",
    "data.eval_revision",
    "data.tokenizer",
    "data.tokenizer_revision",
)
MAY_MOVE = (*_OF_THE_MODEL, *_OF_TEXT)
"""Keys that say where something lies, not what it is: `may_move` has those of a run."""

Sources = dict[str, dict[str, str]]
"""Where parts of a configuration, `model` and `data`, are from, by field: paths, ids and commits of a hub."""


def may_move(config: RunConfig) -> tuple[str, ...]:
    """What may be said anew of a run whose model or text lies elsewhere now.

    Digests tell whether it is the same; of text that is streamed there are none.
    """
    of_the_model = _OF_THE_MODEL if isinstance(config.model, HuggingFace) else ()
    has_digests = isinstance(config.data, Tokens) and not config.data.streaming
    return (*of_the_model, *(_OF_TEXT if has_digests else ()))


def pinned(config: RunConfig) -> RunConfig:
    """A configuration that means the same later and elsewhere.

    What is taken from a hub, where branches move on, has its commit; what is local has its whole path.
    """
    model, data = config.model, config.data
    named = {"model": _names(model) | model.commits(), "data": _names(data) | data.commits()}
    return from_sources(config, named)


def with_whole_paths(config: RunConfig) -> RunConfig:
    """A configuration that names what is local by its whole path."""
    return from_sources(config, {"model": _names(config.model), "data": _names(config.data)})


def sources(config: RunConfig) -> Sources:
    """What a configuration says: names, and fields `revision` and `<what>_revision`."""
    named: Sources = {}
    for part, section in (("model", config.model), ("data", config.data)):
        fields = [f.name for f in dataclasses.fields(section) if f.name.split("_")[-1] == "revision"]
        values = {field: getattr(section, field) for field in fields}
        named[part] = {field: value for field, value in values.items() if value is not None}
    return {"model": named["model"] | _names(config.model), "data": named["data"] | _names(config.data)}


def _names(section: TargetSpec | DataSource) -> dict[str, str]:
    """What a section says that it reads; of a user's own also files that its fields name, whole."""
    if not is_users(section):
        return section.names()
    texts = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return {
        name: str(Path(text).absolute())
        for name, text in texts.items()
        if isinstance(text, str) and _is_path(text)
    } | section.names()


def _is_path(text: str) -> bool:
    """Whether a text is a path: a whole one, or one that begins here and leads somewhere."""
    path = Path(text)
    looks_like_one = len(path.parts) > 1 or path.suffix != ""
    try:
        return path.is_absolute() or (looks_like_one and path.exists())
    except OSError:  # too long for one
        return False


def is_commit(revision: str | None) -> bool:
    """Whether a revision is a whole commit, which no hub can move."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def from_sources(config: RunConfig, sources: Sources) -> RunConfig:
    """A configuration that takes model and data from there."""
    parts = {part: dataclasses.replace(getattr(config, part), **own) for part, own in sources.items()}
    return dataclasses.replace(config, **parts)


def elsewhere(config: RunConfig, places: Mapping[str, str]) -> RunConfig:
    """The configuration of a run whose model or text lies elsewhere now.

    Raises:
        ConfigError: a key says something else than where they are.
    """
    known = may_move(config)
    if wrong := [key for key in places if key not in known]:
        listed = f"only {', '.join(known)} say where something lies" if known else "its run names no places"
        raise ConfigError(f"moved: got {', '.join(wrong)}, but {listed}")
    named: Sources = {"model": {}, "data": {}}
    for key, place in places.items():
        part, _, field = key.partition(".")
        named[part][field] = place
    return with_whole_paths(from_sources(config, named))
