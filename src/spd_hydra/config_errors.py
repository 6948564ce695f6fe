"""What is wrong with a configuration, in words for the person who typed it."""

import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spd_hydra.section import ConfigError, Section, registered

_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_EXAMPLES = {int: "64,32", float: "0.5,0.1", str: "first,second"}
_SIGNS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
TERMS, _EXTRA = "loss_term", "loss.extra"  # the config group of plug-ins' loss terms, and where they go
_TIED = "decomposition.tied"
NO_TERMS = "no plug-in offers loss terms; install the package that has yours (CONTRIBUTING.md, a plug-in)"
_PLURALS = {int: "whole numbers", float: "numbers", bool: "true or false", str: "texts"}


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that is most like this one, or None when none is close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return matches[0] if matches else None


def nearest_keys(key: str, known: Iterable[str]) -> list[str]:
    """The known full keys that a person who typed `key` may have meant, at most three."""
    keys = list(known)
    ending = [name for name in keys if name.endswith(f".{key}")]
    if ending:
        return sorted(ending, key=lambda name: name.count("."))[:3]
    close = nearest(key, keys)
    if close:
        return [close]
    by_last = {name.rpartition(".")[2]: name for name in reversed(keys)}
    close = nearest(key.rpartition(".")[2], by_last)
    return [by_last[close]] if close else []


def full_keys(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key of a composed configuration, sections included."""
    for name in map(str, cfg):
        key = f"{prefix}{name}"
        yield key
        if not OmegaConf.is_missing(cfg, name) and not OmegaConf.is_interpolation(cfg, str(name)):
            child = cfg[name]
            if isinstance(child, DictConfig):
                yield from full_keys(child, f"{key}.")


def unknown_key(key: str, cfg: DictConfig, groups: Iterable[str] = (), *, is_deleted: bool = False) -> str:
    """The message for a key that no section declares, and that was to be set or to be deleted."""
    entry = _new_entry(key, cfg)
    if entry:
        mapping, name = entry
        node = OmegaConf.select(cfg, mapping)
        missing = _no_entry(mapping, name, list(map(str, node)))
        return missing if is_deleted else f"{missing} {_how_to_add(node, mapping, name)}"
    if not is_deleted and (choice := _plugged_term(key, cfg)):
        return choice
    if key == TERMS:
        return NO_TERMS
    group, _, name = key.rpartition(".")
    kinds = [kind for kind, cls in registered(group).items() if name in _field_names(cls)]
    if kinds:
        kind = " or ".join(kinds)
        return f"the chosen {group} has no such key, that of kind {kind} has it: choose one with {group}=…"
    meant = nearest_keys(key, [*groups, *full_keys(cfg)])
    if meant:
        return f"there is no such key; did you mean {' or '.join(meant)}?"
    parent = key.rpartition(".")[0]
    section = OmegaConf.select(cfg, parent, throw_on_missing=False) if parent else None
    if isinstance(section, DictConfig):
        return f"there is no such key; {parent} has {_listed(section)}"
    return "there is no such key; spd-run --help lists them all"


def _no_entry(mapping: str, name: str, others: Iterable[str]) -> str:
    known = list(others)
    close = nearest(name, known)
    hint = f"; did you mean {mapping}.{close}?" if close else "."
    only = f", only {', '.join(known)}" if known else ""
    return f"{mapping} has no entry {name}{only}{hint}"


def _field_names(cls: type[Section]) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)}


def must_be_added_whole(key: str, cfg: DictConfig) -> bool:
    """Whether a key is, or lies inside, an entry that a mapping lacks and takes only as part of itself."""
    entry = _new_entry(key, cfg)
    return entry is not None and (key != ".".join(entry) or _holds_sections(OmegaConf.select(cfg, entry[0])))


def _holds_sections(mapping: DictConfig) -> bool:
    element = mapping._metadata.element_type
    return isinstance(element, type) and dataclasses.is_dataclass(element)


def _new_entry(key: str, cfg: DictConfig) -> tuple[str, str] | None:
    """A mapping whose entries a person names, and the entry that a key speaks of but that is not there."""
    parts = key.split(".")
    for end in range(1, len(parts)):
        node = OmegaConf.select(cfg, ".".join(parts[:end]), throw_on_missing=False)
        if isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict and parts[end] not in node:
            return ".".join(parts[:end]), parts[end]
    return None


def _plugged_term(key: str, cfg: DictConfig) -> str | None:
    """Where a plug-in's loss term goes that a key speaks of as if it were one of our own."""
    section, _, rest = key.partition(".")
    name, _, inner = rest.partition(".")
    terms = cfg.get("loss")
    if section != "loss" or not isinstance(terms, DictConfig):
        return None
    kind = nearest(name, [*map(str, terms), *registered(TERMS)])
    if kind is None or kind in terms or kind in terms.get("extra", {}):
        return None
    words = f"{_choice(kind)} {_EXTRA}.{kind}.{inner or 'coeff'}=…"
    return f"there is no such key; the term {kind} of a plug-in goes into {_EXTRA}: {words}"


def _choice(name: str) -> str:
    kind = name if name in registered(TERMS) else "<term>"
    return f"'+{TERMS}@{_EXTRA}.{name}={kind}_schema'"


def wrong_term(name: str, place: str | None, options: Iterable[str]) -> str | None:
    """What is wrong with choosing a loss term of a plug-in for a place, or None.

    Args:
        name: what was chosen.
        place: where it goes; None: nowhere was said.
        options: files that choose terms, besides those that plug-ins register.
    """
    known = [*(f"{kind}_schema" for kind in registered(TERMS)), *options]
    if not known:
        return NO_TERMS
    if name in known and place is not None:
        return None
    close = name if name in known else f"{name}_schema"
    close = close if close in known else nearest(name, known) or ""
    if place is None:
        name = close.removesuffix("_schema")
        return f"say where the term goes: '+{TERMS}@{_EXTRA}.{name or '<name>'}={close or known[0]}'"
    hint = f"did you mean {close}? Choose one of" if close else "must be one of"
    return f"got {name}; {hint} {', '.join(known)}"


def _how_to_add(node: DictConfig, mapping: str, name: str) -> str:
    if mapping == _EXTRA:
        if not registered(TERMS):
            return f"N{NO_TERMS[1:]}"
        known = ", ".join(registered(TERMS))
        of = f", of {known}" if known and name not in registered(TERMS) else ""
        return f"To add one choose the term of a plug-in{of}: {_choice(name)}"
    if mapping == _TIED:
        example = f"+{_TIED}.lm_head=model.embed_tokens"
        return f"To add one give two sites by the paths of their modules, e.g. {example}"
    if not _holds_sections(node):
        return f"To add it: +{mapping}.{name}=…"
    fields = ",".join(f"{field.name}:…" for field in dataclasses.fields(node._metadata.element_type))
    return f"An entry is added whole: '++{mapping}={{{name}:{{{fields}}}}}'"


def wrong_value(key: str, value: Any, cfg: DictConfig) -> str:
    """The message for a value that does not fit its key."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent, throw_on_missing=False) if parent else cfg
    shown = "nothing" if value == "" else "null" if value is None else repr(value)
    field = _fields(node).get(name)
    if field is None:
        if isinstance(node, DictConfig) and _holds_sections(node):
            fields = ", ".join(f"{one.name}: …" for one in dataclasses.fields(node._metadata.element_type))
            return f"got {shown}, must be an entry {{{fields}}}"
        return f"got {shown}, which is not of the right type"
    owner = OmegaConf.get_type(node)
    assert owner is not None, "a node with fields has a type"
    annotation = typing.get_type_hints(owner)[name]
    close = nearest(str(value), _enum_names(annotation), cutoff=0.7)
    hint = f"; did you mean {close}?" if close else ""
    return f"got {shown}, must be {_expected(annotation, bounds_text(field), node, name)}{hint}"


def _fields(node: Any) -> dict[str, dataclasses.Field[Any]]:
    """The fields that the section behind a node declares, by name; none where it is no section."""
    owner = OmegaConf.get_type(node) if isinstance(node, DictConfig) else None
    if not (isinstance(owner, type) and dataclasses.is_dataclass(owner)):
        return {}
    return {field.name: field for field in dataclasses.fields(owner)}


def bounds_text(field: dataclasses.Field[Any]) -> str:
    """The range of a field as its `option` declares it: `≥ 0 and < 1`, or nothing."""
    bounds = field.metadata.get("bounds", {})
    return " and ".join(f"{_SIGNS[name]} {bound:g}" for name, bound in bounds.items())


def missing_value(key: str, cfg: DictConfig, options: Iterable[str] = ()) -> str:
    """The message for a key that must be given and is not."""
    found = list(options)
    entry, _, field = key.rpartition(".")
    mapping, _, name = entry.rpartition(".")
    node = OmegaConf.select(cfg, mapping, throw_on_missing=False) if mapping else None
    if (
        isinstance(node, DictConfig) and OmegaConf.get_type(node) is dict
    ):  # a new entry, or a slip in the name of another
        others = [
            str(other) for other in node if other != name and not OmegaConf.is_missing(node[other], field)
        ]
        return f"{_no_entry(mapping, name, others)} To add one give its {field}: {key}=…"
    return f"must be chosen, {key}={'|'.join(found)}" if found else f"must be given, {key}=…"


def _expected(annotation: Any, limits: str, node: Any, name: str) -> str:
    arguments = [part for part in typing.get_args(annotation) if part is not types.NoneType]
    limits = f" {limits}" if limits else ""
    if types.NoneType in typing.get_args(annotation):
        return f"{_expected(arguments[0], limits.strip(), node, name)} or null"
    if annotation in _TYPE_NAMES:
        return f"{_TYPE_NAMES[annotation]}{limits}"
    if names := _enum_names(annotation):
        return f"one of {', '.join(names)}"
    if typing.get_origin(annotation) is list:
        items, example = _PLURALS.get(arguments[0], "values"), _EXAMPLES.get(arguments[0], "…")
        return f"a list of {items}{limits}, e.g. [{example}]"
    child = OmegaConf.select(node, name, throw_on_missing=False)
    if isinstance(child, DictConfig) and _fields(child):
        return f"a section with the keys {_listed(child)}"
    return "a mapping {name: …}"


def _enum_names(annotation: Any) -> list[str]:
    for part in (annotation, *typing.get_args(annotation)):
        if isinstance(part, type) and issubclass(part, enum.Enum):
            return [member.name for member in part]
    return []


def _listed(node: DictConfig) -> str:
    return ", ".join(str(name) for name in node) or "none"


def wrong_option(group: str, value: Any, options: list[str]) -> str | None:
    """What is wrong with choosing this option of a config group, or None."""
    for option in value if isinstance(value, list) else [value]:
        if option is None:
            off = f"{group}=none switches it off; otherwise " if "none" in options else ""
            return f"got null; {off}choose one of {', '.join(options)}"
        if str(option) not in options:
            close = nearest(str(option), options)
            hint = f"did you mean {close}? Choose one of" if close else "must be one of"
            return f"got {str(option) or 'nothing'}; {hint} {', '.join(options)}"
    return None


def unknown_in_sections(cfg: DictConfig, prefix: str = "") -> Iterator[str]:
    """Full keys that are in a composed configuration but in no section."""
    declared = _fields(cfg)
    for name, node in ((str(name), node) for name, node in cfg.items_ex(resolve=False)):
        key = f"{prefix}{name}"
        if declared and name not in declared:
            yield key
        elif isinstance(node, DictConfig) and not (
            node._is_none() or node._is_interpolation() or node._is_missing()
        ):
            yield from unknown_in_sections(node, f"{key}.")


def invalid(error: ConfigError) -> str:
    """What to print for everything that is wrong, a line each."""
    return "\n".join(["The configuration is not valid:", *(f"  {line}" for line in str(error).splitlines())])
