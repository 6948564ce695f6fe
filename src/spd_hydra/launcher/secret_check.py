"""No secret gets into the files of a job: its script, its pickle, its logs."""

import re
from collections.abc import Mapping
from typing import Any

from spd_hydra.config import RunConfig
from spd_hydra.redaction import redact, redact_words
from spd_hydra.saved_config import to_dict
from spd_hydra.section import ConfigError

_REFERENCE = re.compile(r"""[\w.-]+=["']?\$[\w({]\S*""")


def require_no_secrets(config: RunConfig) -> None:
    """Refuse a configuration with a secret in it: scripts and pickles of a job are files.

    Raises:
        ConfigError: names the keys.
    """
    run, launcher = to_dict(config), _without_references(to_dict(config.launcher))
    found = _changed(run, redact(run)) + _changed(launcher, redact_words(launcher), "launcher")
    if found:
        raise ConfigError(
            "\n".join(
                f"{key}: looks like a secret, and would be written into the files of a job; put it into the "
                "environment or into .env, from where jobs get it too"
                for key in found
            )
        )


def _without_references(value: Any) -> Any:
    """The same without `TOKEN=$NAME` in its texts: where a secret is to be found is none."""
    if isinstance(value, Mapping):
        return {key: _without_references(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_references(item) for item in value]
    return _REFERENCE.sub("", value) if isinstance(value, str) else value


def _changed(before: object, after: object, key: str = "") -> list[str]:
    """Keys whose values differ between two trees of the same shape."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return [
            found
            for name, value in before.items()
            for found in _changed(value, after[name], f"{key}.{name}" if key else str(name))
        ]
    return [] if before == after else [key]
