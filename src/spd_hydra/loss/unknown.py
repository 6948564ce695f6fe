"""Loss terms of plug-ins that are not here, in saved configurations."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NoReturn

from spd_hydra.loss.base import Loss, LossInputs
from spd_hydra.section import ConfigError, kind_of, stands_for


@dataclasses.dataclass(kw_only=True)
class UnknownTerm(Loss):
    """A term whose class is not here: it is saved as it was, and cannot be computed."""

    def statistics(self, inputs: LossInputs) -> NoReturn:
        """Nobody knows what it is.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"loss.extra: the term of kind {kind_of(type(self))} is of a plug-in that is not here; install "
            "the package that has it, or import the module that registers it"
        )


def unknown_term(kind: str, saved: Mapping[str, Any]) -> type[UnknownTerm]:
    """A class for a term as it was saved, every key a field.

    Args:
        kind: `<group>/<kind>` that it was saved with.
        saved: its keys and values.
    """
    return _class_of(kind, tuple(saved))


@functools.cache  # a sweep opens many runs with the same terms
def _class_of(kind: str, keys: tuple[str, ...]) -> type[UnknownTerm]:
    own = {field.name for field in dataclasses.fields(Loss)}
    fields: list[tuple[str, Any, Any]] = [
        (key, Any, dataclasses.field(default=None)) for key in keys if key not in own and key.isidentifier()
    ]
    cls = dataclasses.make_dataclass("UnknownTerm", fields, bases=(UnknownTerm,), kw_only=True)
    stands_for(cls, kind)
    return cls
