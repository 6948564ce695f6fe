"""Credentials from a `.env` file: read into the environment of this process, saved nowhere."""

import logging
import os
import re
from pathlib import Path

logger = logging.getLogger(__name__)

_LINE = re.compile(r"(?:export\s+)?(?P<name>[A-Za-z_]\w*)\s*=\s*(?P<value>.*)", re.ASCII)
_DOUBLE = re.compile(r'"(?P<text>(?:[^"\\]|\\.)*)"\s*(?:#.*)?')
_SINGLE = re.compile(r"'(?P<text>[^']*)'\s*(?:#.*)?")
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", '"': '"', "\\": "\\", "$": "$"}


def load_dotenv(path: Path = Path(".env")) -> list[str]:
    """Put the variables of a file into the environment where they are not set yet.

    Lines are `KEY=VALUE`, optionally after `export`; values may be in single quotes (taken as they are)
    or double quotes (with backslash escapes); `#` begins a comment; nothing is interpolated. A line that
    cannot be read is passed over with a warning that gives its number, never its text.

    Returns:
        The names that were set.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        logger.warning("Cannot read %s: %s. Going on without it.", path, reason)
        return []
    variables, unreadable = parse_dotenv(text)
    for number in unreadable:
        logger.warning("Line %d of %s is not KEY=VALUE and was passed over.", number, path)
    added = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(added)
    return list(added)


def parse_dotenv(text: str) -> tuple[dict[str, str], list[int]]:
    """The variables that a `.env` file sets (the last line wins), and the numbers of unreadable lines."""
    variables: dict[str, str] = {}
    unreadable = []
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        match = _LINE.fullmatch(stripped)
        value = _value(match["value"]) if match else None
        if match is None or value is None:
            unreadable.append(number)
        else:
            variables[match["name"]] = value
    return variables, unreadable


def _value(text: str) -> str | None:
    if text.startswith("'"):
        match = _SINGLE.fullmatch(text)
        value = match["text"] if match else None
    elif text.startswith('"'):
        match = _DOUBLE.fullmatch(text)
        value = re.sub(r"\\(.)", lambda m: _ESCAPES.get(m[1], m[0]), match["text"]) if match else None
    else:
        value = re.split(r"(?:^|\s)#", text, maxsplit=1)[0].strip()
    return None if value is None or "\0" in value else value
