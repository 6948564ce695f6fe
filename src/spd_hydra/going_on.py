"""The command that goes on with a run: where it ran, and on as many processes."""

import shlex
from pathlib import Path
from typing import Any, cast

import yaml

from spd_hydra.command_word import command_word, quoted
from spd_hydra.config import KIND, to_dict
from spd_hydra.launcher_config import Background, Launcher
from spd_hydra.overrides import read
from spd_hydra.section import ConfigError, registered


def going_on(run_dir: Path, launcher: Launcher, ranks: int) -> str:
    """What to type to go on with a run, to be pasted into a shell.

    Args:
        run_dir: its directory.
        launcher: what its job was asked with.
        ranks: how many processes it had, all told.
    """
    return " ".join(["spd-run", command_word("resume", run_dir), *_words(launcher, ranks)])


def launcher_in(sweep_dir: Path, kind: str | None = None) -> Launcher:
    """What the jobs of a sweep were asked with, from its launcher.yaml.

    Args:
        sweep_dir: the directory of the sweep.
        kind: of the launcher; where the file tells of another, or of none, one as it is by default.
    """
    kinds = cast(dict[str, type[Launcher]], registered("launcher"))
    try:
        data: dict[str, Any] = yaml.safe_load((sweep_dir / "launcher.yaml").read_text(encoding="utf-8"))
        found = kinds[str(data.pop(KIND)).rpartition("/")[2]](**data)
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, AttributeError, ConfigError):
        found = Launcher()  # it is for words that are printed, and nothing ends because of them
    return found if kind in {None, found.kind} else kinds.get(str(kind), Launcher)()


def _words(launcher: Launcher, ranks: int) -> list[str]:
    """The words that choose this launcher: its kind, and what is set otherwise than by default."""
    if not isinstance(launcher, Background):  # ranks beside this process, whoever started them
        return [f"launcher.ranks_per_node={ranks}"] if ranks > 1 else []
    plain, default = to_dict(launcher), to_dict(type(launcher)())
    set_ones = {key: value for key, value in plain.items() if value != default[key]}
    return [
        f"launcher={launcher.kind}",
        *(_word(f"launcher.{key}", value) for key, value in set_ones.items()),
    ]


def _word(key: str, value: Any) -> str:
    add = "++" if isinstance(value, dict) else ""
    return shlex.quote(f"{add}{key}={_text(value)}")


def _text(value: Any) -> str:
    """A value in Hydra's grammar, with quotes only where it needs them."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_text(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str):
        return str(value)
    override = read(f"key=[{value}]")
    if override is not None and override.value() == [value]:
        return value
    return f'"{value}"' if '"' not in value and not value.endswith("\\") else quoted(value)
