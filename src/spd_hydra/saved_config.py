"""RunConfig as plain data and as the text of `config.yaml`, and back again."""

import dataclasses
import logging
import typing
from collections.abc import Collection, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, cast

import yaml
from omegaconf import OmegaConf

from spd_hydra.config import RunConfig, problems
from spd_hydra.loss.unknown import unknown_term
from spd_hydra.model.hf_config import first_line
from spd_hydra.run_files import BEGINNING, is_beginning
from spd_hydra.section import ConfigError, Section, checks_deferred, kind_of, registered

log = logging.getLogger(__name__)

KIND = "_kind_"
"""Key that names the class of a pluggable section in plain data; no field begins with an underscore."""

_TERMS, _EXTRA = "loss_term", "loss.extra."  # the group of plug-ins' loss terms, and where they stand


def to_dict(config: Section) -> dict[str, Any]:
    """Plain data of what a section saves, with `_kind_` beside the fields of every pluggable one."""
    kind = kind_of(type(config))
    found: dict[str, Any] = {KIND: kind} if kind else {}
    for field in dataclasses.fields(config):
        if field.metadata.get("saved", True):
            found[field.name] = _plain(getattr(config, field.name))
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return to_dict(value)
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def to_yaml(config: RunConfig) -> str:
    """The text of `config.yaml` in a run directory."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True)


def from_dict(data: Mapping[str, Any], *, keeps_unknown_terms: bool = False) -> RunConfig:
    """The configuration that `to_dict` gave; what is not saved has its default.

    Args:
        data: the plain data.
        keeps_unknown_terms: loss terms of plug-ins that are not here stay as they were saved, with a
            warning; they cannot be computed.

    Raises:
        ConfigError: unknown keys, wrong types, values out of range, an unknown kind, an interpolation.
    """
    for field in dataclasses.fields(RunConfig):
        if field.name in data and not field.metadata.get("saved", True):
            raise ConfigError(
                f"{field.name}: a saved configuration has none; it is chosen when a run is started"
            )
    schema = OmegaConf.structured(RunConfig)
    if KIND in data:
        raise ConfigError(f"{KIND}: a run is of no kind, got {data[KIND]!r}")
    try:
        for key, text in _texts(data):
            if "${" in text:  # it could carry a variable of the environment into what is written down
                raise ConfigError(f"{key}: got {text!r}, but what was saved has values, not references")
        unknown: list[str] = []
        for path, kind in _kinds(data):
            if path.startswith(tuple(f"{term}." for term in unknown)):  # as it was saved, too
                continue
            group, _, name = kind.partition("/")
            classes = registered(group)
            if name not in classes and keeps_unknown_terms and group == _TERMS and path.startswith(_EXTRA):
                unknown.append(path)
                log.warning("%s is of kind %s, which no plug-in here has: it is kept as saved", path, kind)
                classes[name] = unknown_term(kind, _at(data, path))
            if name not in classes:
                raise ConfigError(_unknown_kind(path, kind, classes))
            if not any(isinstance(a, type) and issubclass(classes[name], a) for a in _declared(schema, path)):
                raise ConfigError(f"{path}: cannot be of kind {kind!r}")
            OmegaConf.update(schema, path, OmegaConf.structured(classes[name]), force_add=True)
        merged = OmegaConf.merge(schema, _without_kinds(data))
        with checks_deferred():
            config = cast(RunConfig, OmegaConf.to_object(merged))
    except ConfigError:
        raise
    except Exception as error:  # OmegaConf has many, all of them about this file
        place = getattr(error, "full_key", None)  # of OmegaConf
        reason = f"{place}: {first_line(error)}" if place else first_line(error)
        raise ConfigError(
            f"the saved configuration does not fit this version, or was cut: {reason}"
        ) from error
    if wrong := problems(config):
        raise ConfigError("; ".join(str(problem) for problem in wrong))
    return config


def _at(data: Mapping[str, Any], path: str) -> dict[str, Any]:
    found: Any = data
    for name in path.split("."):
        found = found[name]
    return {name: value for name, value in found.items() if name != KIND}


def _unknown_kind(path: str, kind: str, known: Collection[str]) -> str:
    listed = f"known are {', '.join(sorted(known))}" if known else "none is known"
    return (
        f"{path}: unknown kind {kind!r}; {listed}. Is it of a class of your own? Import the module that "
        "registers it first, or make it a plug-in, which is imported by itself (CONTRIBUTING.md)"
    )


def load_config(path: Path, *, keeps_unknown_terms: bool = False) -> RunConfig:
    """The configuration saved in a run directory; `keeps_unknown_terms` as for `from_dict`.

    Raises:
        ConfigError: there is none, or it does not fit this version.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if is_beginning(path.parent):
            raise ConfigError(f"{path.parent}: {BEGINNING}") from None
        raise ConfigError(f"{path.parent} is no run directory: {_why_no_run(path)}") from None
    except NotADirectoryError:
        folder = path.parent.parent
        hint = f"; did you mean {folder}?" if (folder / path.name).is_file() else ""
        raise ConfigError(f"{path.parent} is a file and no run directory{hint}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no UTF-8, or a date that there is not
        raise ConfigError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} is damaged: it holds no mapping")
    return from_dict(data, keeps_unknown_terms=keeps_unknown_terms)


def _why_no_run(path: Path) -> str:
    if not path.parent.is_dir():
        return "there is no such directory"
    runs = sorted((p.parent.name for p in path.parent.glob(f"*/{path.name}")), key=lambda n: (len(n), n))
    if not runs:
        return f"it holds no {path.name}"
    listed = ", ".join(runs) if len(runs) <= 5 else f"{', '.join(runs[:3])}, …, {runs[-1]}"
    return f"it holds runs, {listed}: take one of them, e.g. {path.parent / runs[0]}"


def differences(old: Section, new: Section) -> list[tuple[str, Any, Any]]:
    """Full keys whose values differ, with both values; a section of another kind is one difference."""
    found = []
    before, after = flat(to_dict(old)), flat(to_dict(new))
    for key in before | after:
        if before.get(key) != after.get(key):
            found.append((key, before.get(key), after.get(key)))
    return found


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by full key, as `train.lr`."""
    found: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _kinds(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in data.items():
        if isinstance(value, dict):
            if KIND in value:
                yield f"{prefix}{key}", str(value[KIND])
            yield from _kinds(value, f"{prefix}{key}.")


def _declared(schema: Any, path: str) -> tuple[Any, ...]:
    """The types that a place of the configuration is declared with."""
    parent, _, name = path.rpartition(".")
    owner: Any = OmegaConf.get_type(OmegaConf.select(schema, parent)) if parent else RunConfig
    if owner is dict:  # an entry: the dictionary's own field says which kind of sections it holds
        return _declared(schema, parent)
    hint = typing.get_type_hints(owner).get(name)
    return (hint, *typing.get_args(hint))


def _texts(data: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain data, keys among them, with the full key it stands under."""
    if isinstance(data, str):
        yield key, data
    elif isinstance(data, list):
        for item in data:
            yield from _texts(item, key)
    elif isinstance(data, dict):
        for name, item in data.items():
            yield from _texts(name, key)
            yield from _texts(item, f"{key}.{name}" if key else str(name))


def _without_kinds(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _without_kinds(value) if isinstance(value, dict) else value
        for key, value in data.items()
        if key != KIND
    }
