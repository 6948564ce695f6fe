"""The words of a command line, one by one: read, applied to a composed configuration, or said to be wrong."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from spd_hydra import config_errors
from spd_hydra.command_word import readably_quoted
from spd_hydra.redaction import redact_command
from spd_hydra.section import Problem

_OPEN = ("decomposition.sites", "decomposition.identities")
"""Mappings that take a new entry from any word about it; what it lacks is said afterwards."""

_NUMBER = re.compile(r"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?")
_NUMBERS = re.compile(rf"\[?{_NUMBER.pattern}(?:,{_NUMBER.pattern})*\]?")
_LARGEST = 2.0**53  # up to which every whole number is a float

Groups = Mapping[str, list[str]]
"""The options of every config group."""


def read(text: str) -> Override | None:
    """One override, or None if Hydra's grammar does not know what it means."""
    try:
        return OverridesParser.create().parse_override(text)
    except HydraException:
        return None


def typed_path(overrides: Sequence[str], key: str) -> str | None:
    """The path that the last override of a key gives it, or None if that is no text.

    Jobs of a sweep are directories called 0, 1, …: what Hydra reads as a number is taken as it was typed.
    """
    found = None
    for text in overrides:
        override = read(text)
        if override is not None and override.key_or_group == key:
            value = override.value()
            if isinstance(value, int | float):
                value = text.partition("=")[2].strip()
            # Path.expanduser would raise for an unknown ~user; so it is a directory that is missing.
            found = os.path.expanduser(value) if isinstance(value, str) and value else None  # noqa: PTH111
    return found


def without_hydra(overrides: Sequence[str]) -> list[str]:
    """The overrides that are for the program, not for Hydra itself."""
    return [text for text in overrides if not is_for_hydra(text)]


def with_entries(overrides: Sequence[str]) -> list[str]:
    """The overrides, each after those that make the entries it speaks of, whole numbers without a point.

    Hydra sets keys of an entry that is there, and adds one only whole and with +. Where an entry is there,
    what makes it changes nothing.
    """
    found: list[str] = []
    for text in map(_with_whole_numbers, overrides):
        made = [f"++{mapping}={{{name}:{{}}}}" for mapping, name in _entries(read(text))]
        found += [*(word for word in made if word not in found), text]
    return found


def _with_whole_numbers(text: str) -> str:
    """A number that is whole, or several, as digits alone: 1e3 or 1000.0 is no int to OmegaConf."""
    key, _, value = text.partition("=")
    if is_for_hydra(text) or not _NUMBERS.fullmatch(value):
        return text
    return f"{key}={_NUMBER.sub(lambda found: _digits(found[0]), value)}"


def _digits(number: str) -> str:
    if number.lstrip("+-").isdecimal():  # it may be a name, as 007
        return number
    value = float(number)
    return str(int(value)) if value.is_integer() and abs(value) < _LARGEST else number


def _entries(override: Override | None) -> Iterator[tuple[str, str]]:
    """The open mappings and entries of theirs that an override sets something of."""
    if override is None or override.is_delete():
        return
    for mapping in _OPEN:
        if override.key_or_group.startswith(f"{mapping}."):
            yield mapping, override.key_or_group.removeprefix(f"{mapping}.").partition(".")[0]
        elif override.key_or_group == mapping and isinstance(value := override.value(), dict):
            yield from ((mapping, str(name)) for name in value)


def is_for_hydra(text: str) -> bool:
    """Whether an override sets something of Hydra itself, such as `hydra.verbose=true`."""
    return text.lstrip("+~").startswith(("hydra.", "hydra/"))


def chooses_group(override: Override, groups: Groups) -> bool:
    """Whether an override chooses an option of a config group, rather than setting values in its section."""
    return override.key_or_group in groups and not isinstance(override.value(), dict)


def apply(cfg: DictConfig, overrides: Sequence[Override], groups: Groups) -> Iterator[Problem]:
    """Put values into a composed configuration, as Hydra would; say of those that do not fit why."""
    for override in overrides:
        key, value, text = override.key_or_group, override.value(), str(override.input_line)
        there = key in set(config_errors.full_keys(cfg))
        is_add = override.is_add() or override.is_force_add()
        if isinstance(value, Sweep):
            yield needs_multirun(override)
        elif override.package is not None or (not there and not is_add):
            yield _unknown(key, text, cfg, groups)
        elif override.is_add() and there and not isinstance(value, dict | list):
            yield Problem(key, f"is there already, write it without +: {text.lstrip('+')}")
        elif override.is_delete():
            yield from _delete(cfg, key)
        elif not there and config_errors.must_be_added_whole(key, cfg):
            yield _unknown(key, text, cfg, groups)
        else:
            try:
                OmegaConf.update(cfg, key, value, merge=True, force_add=is_add)
            except (ConfigAttributeError, ConfigKeyError) as error:
                yield _unknown(str(getattr(error, "full_key", None) or key), text, cfg, groups)
            except OmegaConfBaseException as error:
                full_key = str(getattr(error, "full_key", None) or key)
                inner = value if full_key == key else getattr(error, "value", value)
                yield Problem(full_key, config_errors.wrong_value(full_key, inner, cfg))


def _unknown(key: str, text: str, cfg: DictConfig, groups: Groups) -> Problem:
    given = redact_command([text])[0]
    message = config_errors.unknown_key(key, cfg, groups, is_deleted=text.startswith("~"))
    return Problem(key, f"{message} (given as {given})")


def _delete(cfg: DictConfig, key: str) -> Iterator[Problem]:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if OmegaConf.get_type(node) is not dict:
        yield Problem(key, "cannot be removed, only set to another value")
        return
    with open_dict(node):
        del node[name]


def group_problem(override: Override, options: list[str]) -> Problem | None:
    """What is wrong with choosing an option of a config group, or None."""
    key = override.key_or_group
    if key == config_errors.TERMS and not override.is_delete():
        wrong = config_errors.wrong_term(str(override.value()), override.package, options)
        return Problem(key, wrong) if wrong else None
    if override.package is not None:
        return None  # a further config at another place, e.g. +loss_term@loss.extra.mine=mine
    if override.is_add() or override.is_force_add():
        return Problem(key, f"is chosen without +: {str(override.input_line).lstrip('+')}")
    message = config_errors.wrong_option(key, None if override.is_delete() else override.value(), options)
    return Problem(key, message) if message else None


def unreadable(text: str) -> Problem:
    """The message for words that are no override."""
    text = redact_command([text])[0]
    if "=" not in text:
        return Problem(text, "not understood; write key=value, e.g. seed=1")
    key, _, value = text.partition("=")
    if value.startswith("~"):
        return Problem(text, f"not understood; write ~ as $HOME, or in quotes: '{key}=\"{value}\"'")
    advice = (
        "not understood; write key=value, put the whole into quotes for the shell if it has spaces, brackets "
        "or braces, and text with special characters into another pair: 'key=\"a, b\"'"
    )
    return Problem(text, advice)


def needs_multirun(override: Override) -> Problem:
    """The message for several values where one run is asked for."""
    key, _, value = str(override.input_line).partition("=")
    list_of_them = "" if "(" in value else f", for a list write {key}=[{value}]"
    advice = f"to run once with each add -m{list_of_them}"
    return Problem(override.key_or_group, f"got several values ({value}); {advice}")


def assignment(key: str, value: object) -> str:
    """The override that gives a key a Python value."""
    return f"{'++' if isinstance(value, Mapping) else ''}{key}={_as_text(value)}"


def _as_text(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{name}:{_as_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_as_text, value)) + "]"
    return _as_word(value) if isinstance(value, str) else str(value)


def _as_word(text: str) -> str:
    """A text, with quotes only where Hydra would read something else."""
    override = read(f"key=[{text}]")
    return text if override is not None and override.value() == [text] else readably_quoted(text)
