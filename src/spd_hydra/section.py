"""The base of every configuration section: typed fields with a one-line meaning and a range.

A section is a keyword-only dataclass. The same class is the schema that Hydra composes, the
object that the program runs with, and the source of the help text, so the three cannot drift.
"""

import contextlib
import dataclasses
import difflib
import math
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeVar

from hydra.core.config_store import ConfigStore

SectionType = TypeVar("SectionType", bound="Section")

_checks_deferred: ContextVar[bool] = ContextVar("checks_deferred", default=False)
_registered: dict[str, dict[str, type["Section"]]] = {}
_kind_of: dict[type["Section"], str] = {}

_COMPARISONS: dict[str, tuple[str, Callable[[float, float], bool]]] = {
    "ge": ("≥", lambda value, bound: value >= bound),
    "gt": (">", lambda value, bound: value > bound),
    "le": ("≤", lambda value, bound: value <= bound),
    "lt": ("<", lambda value, bound: value < bound),
}


class ConfigError(ValueError):
    """A user's mistake in the configuration: the message names key, value and what is allowed."""


class Problem(NamedTuple):
    """One thing wrong with a section: the key relative to that section, and what is allowed instead."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    default_factory: Callable[[], Any] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
    saved: bool = True,
) -> Any:
    """Declare a field of a section: its default, its meaning in one line, its closed or open bounds.

    Bounds apply to a number or to each number of a list; NaN and, without an upper bound,
    infinity are never inside a bounded range. What is not `saved` is no part of what a run is, and no file
    can set it.
    """
    bounds = {"ge": ge, "gt": gt, "le": le, "lt": lt}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    metadata = {"help": help, "bounds": given, "saved": saved}
    if default_factory is not None:
        return dataclasses.field(default_factory=default_factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(kw_only=True)
class Section:
    """A part of the configuration that checks itself when it is made.

    Raises:
        ConfigError: a value is outside the range that its field declares, or `problems` of the
            subclass found a contradiction between fields. The message names key, value and range.
    """

    def __post_init__(self) -> None:
        if not _checks_deferred.get():
            for problem in self.problems():
                raise ConfigError(str(problem))

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; a misspelt one would else go unheard.

        Raises:
            ConfigError: the class declares no such name.
        """
        if not hasattr(type(self), name) and name not in type(self).__dataclass_fields__:
            fields = [field.name for field in dataclasses.fields(self)]
            close = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(fields) or 'none'}"
            raise ConfigError(f"{name}: {type(self).__name__} has no such key; {hint}")
        super().__setattr__(name, value)

    def problems(self) -> Iterator[Problem]:
        """What is wrong with this section by itself; subclasses add checks between fields."""
        for field in dataclasses.fields(self):
            bounds = field.metadata.get("bounds", {})
            value = getattr(self, field.name)
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, int | float) and not _inside(number, bounds):
                    wanted = [f"{_COMPARISONS[name][0]} {b:g}" for name, b in bounds.items()]
                    if not math.isfinite(number):
                        wanted.insert(0, "finite")
                    yield Problem(field.name, f"got {value}, must be {' and '.join(wanted)}")
                    break


def _inside(number: float, bounds: dict[str, float]) -> bool:
    if not bounds:
        return True
    return math.isfinite(number) and all(_COMPARISONS[name][1](number, b) for name, b in bounds.items())


@contextlib.contextmanager
def checks_deferred() -> Iterator[None]:
    """Make sections without checking them, so that all problems of a tree can be listed together."""
    token = _checks_deferred.set(True)
    try:
        yield
    finally:
        _checks_deferred.reset(token)


def all_problems(section: Section, prefix: str = "") -> Iterator[Problem]:
    """Every problem of a section and of the sections inside it, with full keys."""
    for problem in section.problems():
        yield Problem(".".join(part for part in (prefix, problem.key) if part), problem.message)
    for key, child in children(section):
        yield from all_problems(child, f"{prefix}.{key}" if prefix else key)


def children(section: Section) -> Iterator[tuple[str, Section]]:
    """The sections directly inside a section, each with its key (`field` or `field.entry`)."""
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if isinstance(value, Section):
            yield field.name, value
        elif isinstance(value, dict):
            for entry, item in value.items():
                if isinstance(item, Section):
                    yield f"{field.name}.{entry}", item


def register(group: str, kind: str) -> Callable[[type[SectionType]], type[SectionType]]:
    """Class decorator: make a section selectable in a config group, as `<kind>_schema` for its YAML files.

    Args:
        group: the config group, e.g. `model`.
        kind: the name under which saved configurations remember the class.

    Raises:
        ValueError: the group already has another class of that kind.
    """

    def add(cls: type[SectionType]) -> type[SectionType]:
        known = _registered.setdefault(group, {})
        if kind in known and known[kind].__qualname__ != cls.__qualname__:
            raise ValueError(f"{group}={kind} is already registered as {known[kind].__qualname__}")
        known[kind] = cls
        _kind_of[cls] = f"{group}/{kind}"
        ConfigStore.instance().store(group=group, name=f"{kind}_schema", node=cls, provider="spd_hydra")
        return cls

    return add


def stands_for(cls: type[Section], kind: str) -> None:
    """Let a class be saved as `<group>/<kind>` that is not here; it cannot be chosen."""
    _kind_of[cls] = kind


def kind_of(cls: type[Section]) -> str | None:
    """`<group>/<kind>` of a registered class, or None for a class that is fixed in its place."""
    return _kind_of.get(cls)


def registered(group: str) -> dict[str, type[Section]]:
    """The classes of a config group by kind."""
    return dict(_registered.get(group, {}))
