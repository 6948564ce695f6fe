"""From the words on a command line to a checked RunConfig: Hydra composes, the sections check."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from hydra import compose as hydra_compose
from hydra import initialize_config_module
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Sweep
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from spd_hydra import config_errors
from spd_hydra.components import load_plugins
from spd_hydra.config import RunConfig, problems
from spd_hydra.section import ConfigError, Problem, checks_deferred

CONFIG_MODULE = "spd_hydra.conf"
CONFIG_NAME = "config"
HYDRA_VERSION_BASE = "1.3"
_SCHEMA_SUFFIX = "_schema"

ConfigStore.instance().store(name=f"run_config{_SCHEMA_SUFFIX}", node=RunConfig, provider="spd_hydra")


def compose(overrides: Sequence[str] = (), *, config_dir: Path | str | None = None) -> RunConfig:
    """The configuration that `spd-run` would run with these overrides.

    May be called anywhere, also in a notebook or inside another Hydra application, whose state it leaves alone.

    Args:
        overrides: as on the command line, e.g. `["experiment=resid_mlp1", "seed=3"]`.
        config_dir: a further folder of YAML files, as `--config-dir`.

    Raises:
        ConfigError: lists everything that is wrong, a line each, with key, value and what is allowed.
    """
    with Composer.open(config_dir) as composer:
        return composer.run_config(overrides)


class Composer:
    """Composes any number of configurations; see `open`."""

    def __init__(self, config_dir: Path | str | None = None) -> None:
        self._base = (
            [f"hydra.searchpath=[{_quoted(f'file://{Path(config_dir).absolute()}')}]"] if config_dir else []
        )

    @classmethod
    @contextlib.contextmanager
    def open(cls, config_dir: Path | str | None = None) -> Iterator["Composer"]:
        """A composer that is usable within the `with` block; afterwards Hydra's state is as before.

        Raises:
            ConfigError: the folder does not exist, or a plug-in cannot be loaded.
        """
        if config_dir is not None and not Path(config_dir).is_dir():
            raise ConfigError(f"--config-dir: there is no folder {config_dir}")
        load_plugins()
        others, version = GlobalHydra.instance().hydra, copy.copy(VersionBase.instance())
        GlobalHydra.instance().clear()
        try:
            with initialize_config_module(CONFIG_MODULE, version_base=HYDRA_VERSION_BASE):
                yield cls(config_dir)
        finally:
            GlobalHydra.instance().hydra = others
            VersionBase.set_instance(version)

    def run_config(self, overrides: Sequence[str]) -> RunConfig:
        """The configuration with these overrides.

        Raises:
            ConfigError: lists everything that is wrong.
        """
        cfg = self.composed(overrides)
        if any(_problems(cfg, {})):
            raise ConfigError("\n".join(str(problem) for problem in _problems(cfg, self.groups())))
        return to_run_config(cfg)

    def composed(self, overrides: Sequence[str]) -> DictConfig:
        """What Hydra composes from these overrides, of the right types but otherwise unchecked.

        Raises:
            ConfigError: lists every override that does not fit.
        """
        try:
            return hydra_compose(CONFIG_NAME, [*overrides, *self._base])
        except Exception as error:  # Hydra has its own, OmegaConf's, and plain ones, all about these words
            raise ConfigError("\n".join(self._diagnosis(overrides, error))) from error

    def jobs(self, overrides: Sequence[str]) -> list[list[str]]:
        """The overrides of each job of a sweep, in the order in which Hydra's basic sweeper numbers them.

        Raises:
            ConfigError: an override cannot be read, or what it sweeps over does not exist.
        """
        loader = self._loader()
        try:
            with_hydra = GlobalHydra.instance().hydra
            assert with_hydra is not None, "a composer is used within its with block"
            master = with_hydra.compose_config(
                config_name=CONFIG_NAME,
                overrides=[*overrides, *self._base],
                run_mode=RunMode.MULTIRUN,
                with_log_configuration=False,
            )
            parameters = OmegaConf.select(master, "hydra.sweeper.params") or {}
            texts = [f"{key}={value}" for key, value in parameters.items()]
            parser = OverridesParser.create(config_loader=loader)
            parsed = parser.parse_overrides([*texts, *_without_hydra(overrides)])
            return cast(list[list[str]], BasicSweeper.split_arguments(parsed, None)[0])
        except Exception as error:
            simple = [text for text in overrides if not self._is_sweep(text)]
            raise ConfigError("\n".join(self._diagnosis(simple, error))) from error

    def groups(self) -> dict[str, list[str]]:
        """Every config group with the options that a person may choose."""
        loader = self._loader()
        names = [name for name in loader.list_groups("") if name != "hydra" and not name.startswith("_")]
        return {name: self._options(name) for name in names}

    def _options(self, group: str, below: str = "") -> list[str]:
        loader = self._loader()
        path = f"{group}/{below}".rstrip("/")
        found = loader.get_group_options(path, ObjectType.CONFIG, None, self._base)
        options = [f"{below}{name}" for name in found if not name.endswith(_SCHEMA_SUFFIX)]
        for name in loader.get_group_options(path, ObjectType.GROUP, None, self._base):
            if not name.startswith("_"):
                options += self._options(group, f"{below}{name}/")
        return options

    def _loader(self) -> Any:
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None, "a composer is used within its with block"
        return hydra.config_loader

    def _is_sweep(self, text: str) -> bool:
        try:
            return bool(OverridesParser.create().parse_override(text).is_sweep_override())
        except HydraException:
            return False

    def _diagnosis(self, overrides: Sequence[str], error: Exception) -> list[str]:
        """Everything that is wrong with these overrides, a line each; at least what the error says."""
        groups = self.groups()
        chosen, values, lines = [], [], []
        for text in overrides:
            try:
                override = OverridesParser.create().parse_override(text)
            except HydraException:
                lines.append(_unreadable(text))
                continue
            key = override.key_or_group
            if key.split(".")[0].split("/")[0] == "hydra":
                chosen.append(text)
            elif isinstance(override.value(), Sweep):
                lines.append(_needs_multirun(text, override))
            elif key in groups and not isinstance(override.value(), dict):
                problem = _group_problem(override, groups[key])
                lines.append(f"{key}: {problem}") if problem else chosen.append(text)
            else:
                values.append(override)
        try:
            cfg = hydra_compose(CONFIG_NAME, [*chosen, *self._base])
        except Exception as other:
            return lines or [explain(other)]
        lines += [f"{problem}" for problem in _apply(cfg, values, groups)]
        lines += [f"{problem}" for problem in _problems(cfg, groups)]
        return lines or [explain(error)]


def to_run_config(cfg: DictConfig) -> RunConfig:
    """The checked RunConfig of what Hydra composed.

    Raises:
        ConfigError: lists every unknown key, missing value and value out of range.
    """
    found = list(_problems(cfg, {}))
    if found:
        raise ConfigError("\n".join(str(problem) for problem in found))
    with checks_deferred():
        return cast(RunConfig, OmegaConf.to_object(_declared(cfg)))


def apply_overrides(saved: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A saved configuration with what was typed to go on with it.

    Choosing another option of a group (`logger=wandb`) replaces that section.

    Args:
        saved: as it was saved with a run.
        overrides: as on the command line; those for Hydra itself are passed over.

    Raises:
        ConfigError: lists everything that is wrong.
    """
    cfg = OmegaConf.structured(saved)
    lines, values = [], []
    with Composer.open() as composer:
        groups = composer.groups()
        for text in _without_hydra(overrides):
            try:
                override = OverridesParser.create().parse_override(text)
            except HydraException:
                lines.append(_unreadable(text))
                continue
            key = override.key_or_group
            if key not in groups or isinstance(override.value(), dict):
                values.append(override)
            elif key not in cfg:
                lines.append(
                    f"{key}: got {override.value()}, but a run that goes on keeps its own; leave {key}= out"
                )
            elif problem := _group_problem(override, groups[key]):
                lines.append(f"{key}: {problem}")
            else:
                cfg[key] = composer.composed([text])[key]
    lines += [str(problem) for problem in _apply(cfg, values, groups)]
    lines += [str(problem) for problem in _problems(cfg, groups)]
    if lines:
        raise ConfigError("\n".join(lines))
    return to_run_config(cfg)


def explain(error: BaseException) -> str:
    """What Hydra or OmegaConf says, in one line, without advice that does not fit here."""
    texts = [str(error), str(error.__cause__ or "")]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    kept = [
        line
        for line in lines
        if not line.startswith(("See https", "Set the env", "object_type", "reference_type"))
    ]
    return "; ".join(dict.fromkeys(kept))


def _apply(cfg: DictConfig, overrides: Sequence[Override], groups: dict[str, list[str]]) -> Iterator[Problem]:
    """Put values into a configuration, leaving out those that do not fit, and say why."""
    for override in overrides:
        key, value = override.key_or_group, override.value()
        if isinstance(value, Sweep):
            yield Problem("", _needs_multirun(str(override.input_line), override))
            continue
        there = key in set(config_errors.full_keys(cfg))
        is_add = override.is_add() or override.is_force_add()
        if override.package is not None or (not there and not is_add):
            yield Problem(key, f"{config_errors.unknown_key(key, cfg, groups)} (in {override.input_line})")
        elif override.is_add() and there and not isinstance(value, dict | list):
            yield Problem(
                key, f"is there already, so write it without +: {str(override.input_line).lstrip('+')}"
            )
        elif override.is_delete():
            yield from _delete(cfg, key)
        else:
            try:
                OmegaConf.update(cfg, key, value, merge=True, force_add=is_add)
            except (ConfigAttributeError, ConfigKeyError):
                yield Problem(
                    key, f"{config_errors.unknown_key(key, cfg, groups)} (in {override.input_line})"
                )
            except OmegaConfBaseException as error:
                full_key = str(getattr(error, "full_key", None) or key)
                inner = value if full_key == key else getattr(error, "value", value)
                yield Problem(full_key, config_errors.wrong_value(full_key, inner, cfg))


def _delete(cfg: DictConfig, key: str) -> Iterator[Problem]:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if OmegaConf.get_type(node) is not dict:
        yield Problem(key, "cannot be removed, only set to another value")
        return
    with open_dict(node):
        del node[name]


def _problems(cfg: DictConfig, groups: dict[str, list[str]]) -> Iterator[Problem]:
    """What is wrong with a composed configuration, all of it."""
    clean = _declared(cfg)
    if not cfg.get("allow_extra"):
        for key in config_errors.unknown_in_sections(cfg):
            hint = config_errors.unknown_key(key, clean, groups)
            yield Problem(key, f"{hint} (allow_extra=true accepts it, unused)")
    missing = OmegaConf.missing_keys(clean)
    for key in sorted(missing):
        yield Problem(key, config_errors.missing_value(key, groups.get(key, [])))
    if missing:
        return
    try:
        with checks_deferred():
            config = cast(RunConfig, OmegaConf.to_object(clean))
    except OmegaConfBaseException as error:
        yield Problem(str(getattr(error, "full_key", None) or ""), explain(error))
        return
    yield from problems(config)


def _declared(cfg: DictConfig) -> DictConfig:
    """The configuration without keys that no section declares."""
    clean = cfg.copy()
    for key in list(config_errors.unknown_in_sections(cfg)):
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(clean, parent) if parent else clean
        with open_dict(node):
            del node[name]
    return clean


def _group_problem(override: Override, options: list[str]) -> str | None:
    key = override.key_or_group
    if override.package is not None:
        return None
    if override.is_delete():
        return config_errors.group_problem(key, None, options)
    if override.is_add() or override.is_force_add():
        return f"is chosen without +: {str(override.input_line).lstrip('+')}"
    return config_errors.group_problem(key, override.value(), options)


def _unreadable(text: str) -> str:
    if "=" not in text:
        return f"{text}: not understood; write key=value, e.g. seed=1"
    return (
        f"{text}: not understood; write key=value. Values with spaces, commas, brackets or braces need quotes "
        "for the shell around the whole, and text with special characters another pair: 'key=\"a, b\"'"
    )


def _needs_multirun(text: str, override: Override) -> str:
    key, _, value = text.partition("=")
    return (
        f"{override.key_or_group}: got several values ({value}); to run once with each add -m, "
        f"for a list write {key}=[{value}]"
    )


def _without_hydra(overrides: Sequence[str]) -> list[str]:
    return [text for text in overrides if not text.lstrip("+~").startswith(("hydra.", "hydra/"))]


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
