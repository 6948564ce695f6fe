"""Words of a command line as they are printed for a person to type: quoted for Hydra and for the shell."""

import re
import shlex

# A path of these alone is a text to Hydra too, with its slash no number, null or true.
_PLAIN = re.compile(r"[\w.+-]*/[\w./+-]*", re.ASCII)


def command_word(key: str, value: object) -> str:
    """The word that gives a key a text, to be pasted into a shell."""
    text = str(value)
    return shlex.quote(f"{key}={text if _PLAIN.fullmatch(text) else readably_quoted(text)}")


def readably_quoted(text: str) -> str:
    """The same as `quoted`, in double quotes if it can be: they stay readable between those of the shell."""
    return quoted(text) if '"' in text or text.endswith("\\") else f'"{text}"'


def quoted(text: str) -> str:
    """Text as a value in Hydra's grammar, whatever characters it has."""
    # A backslash is itself to Hydra, except before a quote.
    return "'" + re.sub(r"\\*(?='|\Z)", lambda found: 2 * found[0], text).replace("'", "\\'") + "'"
