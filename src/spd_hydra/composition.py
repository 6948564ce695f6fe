"""The run that words ask for: of the presets, or of a saved configuration where the words name one."""

import dataclasses
import typing
from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, DictConfig, OmegaConf

from spd_hydra.command_word import command_word
from spd_hydra.composer import Composer, apply_overrides, explain
from spd_hydra.config import Device, RunConfig, Task, problems, sections
from spd_hydra.config_errors import wrong_value
from spd_hydra.launcher_config import Background
from spd_hydra.overrides import read, typed_path, without_hydra
from spd_hydra.saved_config import from_dict, load_config, to_dict
from spd_hydra.saved_run import TOLD_MAY_CHANGE, fixed, require_trust
from spd_hydra.section import ConfigError, Problem, Section
from spd_hydra.sources import MAY_MOVE

_OF_ANALYSE = ("task", "run", "eval", "device", "threads", "launcher", "trust_remote_code", *MAY_MOVE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One run: its overrides, its configuration, and for a resume the configuration as it was saved."""

    overrides: list[str]
    config: RunConfig
    saved: RunConfig | None = None


def compose(overrides: Sequence[str] = (), *, config_dir: Path | str | None = None) -> RunConfig:
    """The configuration that `spd-run` would run with these overrides.

    May be called anywhere, also in a notebook or inside another Hydra application: it keeps its state.

    `resume=` and `task=analyse` with `run=` take the saved configuration of that run, with the other words
    on top.

    Checked are keys, types, ranges and contradictions between values. What shows only when the parts are
    built is checked by `decompose`, before it makes a directory or trains anything, and by
    `preflight.preflight(config)`: whether site patterns match a module of the target, whether ties and data
    fit it, whether there is a GPU if one is asked for.

    Args:
        overrides: as on the command line, e.g. `["experiment=resid_mlp1", "seed=3"]`.
        config_dir: a further folder of YAML files, as `--config-dir`.

    Raises:
        ConfigError: lists everything that is wrong, a line each, with key, value and what is allowed.
    """
    require_texts(overrides, "compose")
    with Composer.open(config_dir) as composer:
        return compose_job(composer, overrides, config_dir).config


def require_texts(overrides: object, function: str) -> None:
    """Refuse one text, which is a sequence of its letters, and whatever else is no list of texts.

    Raises:
        ConfigError: says how `function` is called with them.
    """
    words = overrides if isinstance(overrides, Sequence) and not isinstance(overrides, str) else [overrides]
    listed = [str(word) for word in words]
    if isinstance(overrides, str) or listed != list(words):
        raise ConfigError(
            f"overrides: got {overrides!r}, must be a list of texts, e.g. {function}({listed!r})"
        )


def settled(config: RunConfig) -> RunConfig:
    """A configuration that was made or changed in Python, as its run directory will give it again.

    Raises:
        ConfigError: lists everything that `compose` would have refused, and what could not be saved.
    """
    found = list(_wrong_types(config)) or problems(config)
    if found:
        raise ConfigError("\n".join(dict.fromkeys(str(problem) for problem in found)))
    try:
        from_dict(to_dict(config))
    except ConfigError as error:
        reason = explain(error.__cause__) if error.__cause__ else str(error)
        raise ConfigError(f"the configuration could not be read back from its directory: {reason}") from error
    return dataclasses.replace(config)  # what follows from a value that was set, such as target_steps


def _wrong_types(config: RunConfig) -> Iterator[Problem]:
    """Values that a field of this type does not hold, in this section and in those inside it."""
    for key, section in sections(config):
        # The class alone: OmegaConf refuses a section as a whole for one value, without naming all.
        schema = OmegaConf.structured(type(section))
        hints = typing.get_type_hints(type(section))
        for field in dataclasses.fields(section):
            message = _wrong_type(schema, field.name, getattr(section, field.name), hints[field.name])
            if message is not None:
                yield Problem(f"{key}.{field.name}" if key else field.name, message)


def _wrong_type(schema: DictConfig, name: str, value: Any, hint: Any) -> str | None:
    """What is wrong with a value of a field, or None; sections are looked into one by one."""
    for declared in (hint, *typing.get_args(hint)):
        if isinstance(declared, type) and issubclass(declared, Section):
            return _wrong_section(value, declared, hint)
    if isinstance(value, str) and ("${" in value or value == MISSING):
        return f"got {value!r}, must be a value, not a reference"
    try:
        schema[name] = value
        plain = cast(dict[str, Any], OmegaConf.to_container(schema))[name]
    except Exception:  # OmegaConf has many for a value that does not fit
        return wrong_value(name, value, schema)
    # OmegaConf reads texts, '5' as 5, but here the value goes on as it is; a float may be given as an int.
    is_alike = type(plain) is type(value) or (type(plain) is float and type(value) is int)
    if is_alike and (plain == value or value != value):  # NaN equals nothing, also not itself
        return None
    return f"got {value!r}, must be {plain if isinstance(plain, Enum) else repr(plain)}"


def _wrong_section(value: Any, declared: type[Section], hint: Any) -> str | None:
    """What is wrong with a value where a section, or a dict of sections by name, is declared; or None."""
    if typing.get_origin(hint) is dict:
        fits = isinstance(value, dict) and all(isinstance(item, declared) for item in value.values())
        wanted = f"a dict of {declared.__name__} by name"
    else:
        fits = isinstance(value, declared) or (value is None and type(None) in typing.get_args(hint))
        wanted = f"a {declared.__name__}"
    return None if fits else f"got {value!r}, must be {wanted}"


def compose_job(composer: Composer, overrides: Sequence[str], config_dir: Path | str | None = None) -> Job:
    """One job, composed and checked, see `compose`.

    Raises:
        ConfigError: lists everything that is wrong.
    """
    directory = typed_path(overrides, "resume")
    if directory is None:
        if _asks_for_analysis(overrides) and typed_path(overrides, "run"):
            _require_only(_OF_ANALYSE, overrides)  # before words meant for that run are taken for the default
        analyses = _asks_for_analysis(overrides)
        config = composer.run_config(_without(MAY_MOVE, overrides) if analyses else overrides)
        if config.task is Task.analyse:
            config = _of_analysis(config, overrides, config_dir)
        return Job(overrides=list(overrides), config=config)
    try:
        saved = load_config(Path(directory) / "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"resume: {error}") from error
    try:
        changed = apply_overrides(saved, overrides, config_dir=config_dir)
    except ConfigError as error:
        raise ConfigError(f"{error}{_left_out_hint(overrides, saved, directory)}") from error
    config = dataclasses.replace(changed, resume=directory)
    require_trust(Path(directory), config, trusted=config.trust_remote_code, yes="add trust_remote_code=true")
    return Job(overrides=list(overrides), config=config, saved=saved)


def _of_analysis(composed: RunConfig, overrides: Sequence[str], config_dir: Path | str | None) -> RunConfig:
    """The run's saved configuration with what was typed; the machine is described by what was composed."""
    _require_only(_OF_ANALYSE, overrides)
    if isinstance(composed.launcher, Background):
        raise ConfigError(
            f"launcher: got {composed.launcher.kind}, but task=analyse is done in this process; use "
            "launcher=local, on a cluster within an allocation: srun spd-run task=analyse ..."
        )
    directory = Path(typed_path(overrides, "run") or str(composed.run))
    try:
        saved = load_config(directory / "config.yaml")
    except ConfigError as error:
        raise ConfigError(f"run: {error}") from error
    require_trust(directory, saved, trusted=composed.trust_remote_code, yes="add trust_remote_code=true")
    config = apply_overrides(saved, overrides, config_dir=config_dir)
    # The machine that measures may have no GPU where the run had one.
    device = config.device if composed.device is Device.auto else composed.device
    return dataclasses.replace(
        config, run=str(directory), device=device, threads=composed.threads, launcher=composed.launcher
    )


def _asks_for_analysis(overrides: Sequence[str]) -> bool:
    words = [read(text) for text in overrides]
    asked = [word.value() for word in words if word is not None and word.key_or_group == "task"]
    return asked[-1:] == [Task.analyse.name]


def _left_out_hint(overrides: Sequence[str], saved: RunConfig, directory: str) -> str:
    """What to add to a complaint about words of a resume of which some could never be followed."""
    keys = fixed(saved)
    read_words = [(text, read(text)) for text in without_hydra(overrides)]
    others = [
        text
        for text, word in read_words
        if word is not None and any(f"{key}.".startswith(f"{word.key_or_group}.") for key in keys)
    ]
    if not others:
        return ""
    return (
        f"\nA run that goes on takes {TOLD_MAY_CHANGE} only; leave out {' '.join(others)}, or begin a new "
        f"run with what this one has learned: {command_word('start_from', directory)}"
    )


def _without(keys: Sequence[str], overrides: Sequence[str]) -> list[str]:
    read_words = [(text, read(text)) for text in overrides]
    return [text for text, word in read_words if word is None or word.key_or_group not in keys]


def _require_only(keys: Sequence[str], overrides: Sequence[str]) -> None:
    """Nothing that is typed may go unheard: task=analyse takes what was trained from the run."""
    read_words = [(text, read(text)) for text in without_hydra(overrides)]
    others = [
        text
        for text, word in read_words
        if word is not None and not {word.key_or_group, word.key_or_group.partition(".")[0]} & set(keys)
    ]
    if others:
        listed = [key for key in keys if key not in MAY_MOVE]
        raise ConfigError(
            f"task=analyse measures a run as it was trained, so it takes {', '.join(listed)} only; "
            f"leave out {' '.join(others)}"
        )
