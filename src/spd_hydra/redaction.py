"""Takes secrets out of everything that is written down: configuration, command line, environment, diffs.

A value is taken for a secret by the name it goes under, by its form, or because it is the value of an
environment variable with such a name. Credentials belong in the environment; this is the net below.
"""

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

HIDDEN = "<redacted>"

# Under these words any value is hidden; under the others only text is, because `key=3` is no secret.
_ALWAYS = {"secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential", "credentials"}
_TEXT = {"token", "key", "api", "apikey", "auth", "pat"}
_TOKENIZER = {"bos", "eos", "pad", "unk", "sep", "cls", "mask"}  # eos_token: "</s>" is part of a vocabulary
# Below these are names of the target's modules, of which attention has a `key`.
_OF_MODULES = ("decomposition.sites", "decomposition.identities", "decomposition.tied")
_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[oprsu]_[A-Za-z0-9]{16,}|\bgithub_pat_\w{16,}|\bsk-[\w-]{16,}"
    r"|\bAKIA[A-Z0-9]{16}\b|\bwandb_v1_\w{16,}|\bxox[abpr]-[\w-]{10,}"
    r"|(?<=://)[^\s/@:]*:[^\s/@]+(?=@)"  # user:password@ in an address
)
_QUOTED = re.compile(r"""(?P<name>[\w.-]+)(?P<between>["']?\s*[:=]\s*)(?P<value>"[^"\n]{8,}"|'[^'\n]{8,}')""")
_ASSIGNED = re.compile(
    r"""(?P<name>[\w.-]+)(?P<between>["']?\s*[:=]\s*)(?P<value>"[^"]*"|'[^']*'|[^\s,}\]'"]+)"""
)
_HARMLESS = re.compile(r"[+-]?[\d.]+([eE][+-]?\d+)?|true|false|null|none", re.IGNORECASE)
_SHORTEST = 8  # a shorter value of an environment variable would blank out ordinary words


def redact(value: Any, name: str = "") -> Any:
    """A copy of a tree of mappings, lists and scalars with secrets replaced by `<redacted>`.

    Args:
        value: the tree.
        name: the key under which it stands; everything below a secret's name is hidden.
    """
    if isinstance(value, Mapping):
        return {key: redact(item, _inherit(name, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, name) for item in value]
    if isinstance(value, str):
        return HIDDEN if value and _is_secret_name(name) else redact_text(value)
    if value is not None and not isinstance(value, bool) and _ALWAYS.intersection(_words(name)):
        return HIDDEN
    return value


def redact_words(value: Any) -> Any:
    """The same for a tree whose texts are commands: `seed=1 +api_key=x`, `export HF_TOKEN=x`."""
    return redact(_words_redacted(value))


def redact_text(text: str) -> str:
    """Free text, such as a diff, without what looks like a secret or is one in this environment."""
    for secret in _secrets_of_environment():
        text = text.replace(secret, HIDDEN)
    text = _FORMS.sub(HIDDEN, text)
    return _QUOTED.sub(_hide_value, text)


def redact_command(arguments: list[str]) -> list[str]:
    """A command line without secrets: `--token x`, `--token=x`, `a.api_key=x` and `env={HF_TOKEN:x}`."""
    shown, hide_next = [], False
    for argument in arguments:
        shown.append(HIDDEN if hide_next else redact_text(_ASSIGNED.sub(_hide_value, argument)))
        hide_next = argument.startswith("-") and "=" not in argument and _is_secret_name(argument)
    return shown


class Formatter(logging.Formatter):
    """Log messages alone, without secrets; what Hydra says of a job repeats the words of the command line."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return redact_command([text])[0] if record.name.startswith("hydra") else redact_text(text)


def _words_redacted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _words_redacted(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_words_redacted(item) for item in value]
    return redact_command([value])[0] if isinstance(value, str) else value


def _inherit(parent: str, key: str) -> str:
    goes_on = _is_secret_name(parent) or parent == "decomposition" or _names_modules(parent)
    return f"{parent}.{key}" if goes_on else key


def _hide_value(match: re.Match[str]) -> str:
    value = match["value"]
    if not _is_secret_name(match["name"]):
        # The value may itself hold assignments: outer={HF_TOKEN:x}
        return match["name"] + match["between"] + _ASSIGNED.sub(_hide_value, value)
    if _HARMLESS.fullmatch(value) and not _ALWAYS.intersection(_words(match["name"])):
        return match[0]
    return match["name"] + match["between"] + HIDDEN


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORDS.findall(name)]


def _is_secret_name(name: str) -> bool:
    words = _words(name)
    if _ALWAYS.intersection(words):
        return True
    if _names_modules(name) or name.rpartition(".")[2] == "token_column":
        return False
    return any(
        word in _TEXT and not (word == "token" and index and words[index - 1] in _TOKENIZER)
        for index, word in enumerate(words)
    )


def _names_modules(name: str) -> bool:
    return name.startswith(_OF_MODULES)


def _secrets_of_environment() -> list[str]:
    found = {value for name, value in os.environ.items() if _is_secret_name(name)}
    return sorted((value for value in found if len(value) >= _SHORTEST), key=len, reverse=True)
