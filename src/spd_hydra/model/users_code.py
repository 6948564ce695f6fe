"""Errors in classes that users wrote, told as their other mistakes are: which class, where, what is wrong."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from spd_hydra.model.hf_config import first_line
from spd_hydra.section import ConfigError, Section

_OURS = __name__.partition(".")[0]


def is_users(section: Section) -> bool:
    """Whether a section's class is none of this package's."""
    return type(section).__module__.partition(".")[0] != _OURS


class UsersCodeError(ConfigError):
    """A class of a user's own raised something."""


@contextmanager
def told_of(key: str, section: Section, method: str, advice: str = "") -> Iterator[None]:
    """Say of an exception that a user's own section raises where it comes from; one of ours passes as it is.

    Args:
        key: of the section in the configuration.
        section: whose code runs meanwhile.
        method: what is called.
        advice: what may be done about it, behind the error.

    Raises:
        UsersCodeError: key, class, method, line and error, in place of any error but a ConfigError.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if not is_users(section):
            raise
        place, what = _place(section, method, error), f"{type(error).__name__}: {first_line(error)}"
        said = f"{key}: {place} failed with {what}"
        raise UsersCodeError(f"{said}; {advice}" if advice else said) from error


def _place(section: Section, method: str, error: Exception) -> str:
    """`MyNet.build (my_file.py:12)`: the method that was entered, and the line where it failed."""
    cls = type(section)
    files = {code.co_filename for own in vars(cls).values() if (code := getattr(own, "__code__", None))}
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    if not frames:
        return f"{cls.__name__}.{method}"
    # What was called may be inherited, and call a method of the class.
    entered = frames[0].name if frames[0].name in vars(cls) else method
    return f"{cls.__name__}.{entered} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
