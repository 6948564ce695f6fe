"""What is wrong with a configuration, in words for the person who typed it."""

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spd_hydra.section import Section

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_PLURALS = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one, or None when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def nearest_key(key: str, known: Iterable[str]) -> list[str]:
    """The known full keys that a person who typed `key` may have meant, most likely first, at most three."""
    keys = list(known)
    ending = [name for name in keys if name.endswith(f".{key}")]
    if ending:
        return sorted(ending, key=lambda name: name.count("."))[:3]
    close = nearest(key, keys)
    if close:
        return [close]
    last = key.rpartition(".")[2]
    by_last = {name.rpartition(".")[2]: name for name in reversed(keys)}
    close = nearest(last, by_last)
    return [by_last[close]] if close else []


def full_keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a composed configuration, sections included."""
    for name in cfg:
        key = f"{prefix}{name}"
        yield key
        if not OmegaConf.is_missing(cfg, name) and not OmegaConf.is_interpolation(cfg, str(name)):
            child = cfg[name]
            if isinstance(child, DictConfig):
                yield from full_keys(child, f"{key}.")


def unknown_key(key: str, cfg: DictConfig, groups: Iterable[str] = ()) -> str:
    """The message for a key that no section declares."""
    parent, _, _ = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, throw_on_missing=False) if parent else None
    if isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict:
        return f"{parent} has no entry of that name; it has {_listed(node)}" + new_entry_hint(node, key)
    top = parent.rpartition(".")[0]
    above = OmegaConf.select(cfg, top, throw_on_missing=False) if top else None
    if isinstance(above, DictConfig) and OmegaConf.get_type(above) is dict and parent not in full_keys(cfg):
        return f"{top} has no entry {parent.rpartition('.')[2]!r}; it has {_listed(above)}" + new_entry_hint(
            above, parent
        )
    meant = nearest_key(key, [*groups, *full_keys(cfg)])
    if meant:
        return f"there is no such key; did you mean {' or '.join(meant)}?"
    if isinstance(node, DictConfig):
        return f"there is no such key; {parent} has {_listed(node)}"
    return "there is no such key; spd-run --help lists them all"


def new_entry_hint(node: DictConfig, key: str) -> str:
    """How to add an entry to a section whose entries have names of the user's choice."""
    element = node._metadata.element_type
    if not (isinstance(element, type) and dataclasses.is_dataclass(element)):
        return f". To add it: +{key}=…"
    parent, _, name = key.rpartition(".")
    fields = ",".join(f"{field.name}:…" for field in dataclasses.fields(element))
    return f". A new entry is added whole: '++{parent}={{{name}:{{{fields}}}}}'"


def wrong_value(key: str, value: Any, cfg: DictConfig) -> str:
    """The message for a value that does not fit its key."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, throw_on_missing=False) if parent else cfg
    owner = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
    shown = "nothing" if value == "" else "null" if value is None else repr(value)
    if not (isinstance(owner, type) and dataclasses.is_dataclass(owner)):
        return f"got {shown}, which is not of the right type"
    field = next((field for field in dataclasses.fields(owner) if field.name == name), None)
    if field is None:
        return f"got {shown}, but there is no such key"
    annotation = typing.get_type_hints(owner)[name]
    wanted = _expected(annotation, node, name)
    limits = bounds_text(field)
    hint = ""
    options = _enum_names(annotation)
    if options and isinstance(value, str) and (close := nearest(value, options)):
        hint = f"; did you mean {close}?"
    return f"got {shown}, must be {wanted}{' ' + limits if limits else ''}{hint}"


def bounds_text(field: dataclasses.Field[Any]) -> str:
    """The range of a field as its `option` declares it: `≥ 0 and < 1`, or nothing."""
    bounds = field.metadata.get("bounds", {})
    return " and ".join(f"{_SIGNS[name]} {bound:g}" for name, bound in bounds.items())


def missing_value(key: str, options: Iterable[str] = ()) -> str:
    """The message for a key that must be given and is not."""
    found = list(options)
    return f"must be chosen: {key}={'|'.join(found)}" if found else f"must be given: {key}=…"


def _expected(annotation: Any, node: Any, name: str) -> str:
    arguments = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    if types.NoneType in typing.get_args(annotation):
        return f"{_expected(arguments[0], node, name)} or null"
    if annotation in _TYPE_NAMES:
        return _TYPE_NAMES[annotation]
    if names := _enum_names(annotation):
        return f"one of {', '.join(names)}"
    if typing.get_origin(annotation) is list:
        return f"a list of {_PLURALS.get(arguments[0], 'values')}, e.g. {name}=[…,…]"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        child = OmegaConf.select(node, name, throw_on_missing=False)
        return f"a section with the keys {_listed(child)}" if isinstance(child, DictConfig) else "a section"
    return "a mapping {name: …}"


def _enum_names(annotation: Any) -> list[str]:
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, enum.Enum):
            return [member.name for member in part]
    return []


def _listed(node: DictConfig) -> str:
    return ", ".join(str(name) for name in node) or "none"


def group_problem(group: str, value: Any, options: list[str]) -> str | None:
    """What is wrong with choosing this option of a config group, or None."""
    chosen = value if isinstance(value, list) else [value]
    for option in chosen:
        if option is None:
            off = f"; {group}=none switches it off" if "none" in options else ""
            return f"got null, choose one of {', '.join(options)}{off}"
        if str(option) not in options:
            close = nearest(str(option), options)
            hint = f"; did you mean {close}?" if close else ""
            return f"got {str(option) or 'nothing'}, must be one of {', '.join(options)}{hint}"
    return None


def unknown_in_sections(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Full keys that are in a composed configuration but in no dataclass."""
    owner = OmegaConf.get_type(cfg)
    declared = (
        {field.name for field in dataclasses.fields(owner)}
        if isinstance(owner, type) and dataclasses.is_dataclass(owner)
        else None
    )
    for name in cfg:
        key = f"{prefix}{name}"
        if declared is not None and name not in declared:
            yield key
        elif not OmegaConf.is_missing(cfg, name):
            child = cfg._get_node(name)
            if isinstance(child, DictConfig) and not child._is_none() and not child._is_interpolation():
                yield from unknown_in_sections(child, f"{key}.")
