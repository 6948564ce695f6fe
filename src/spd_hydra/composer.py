"""Words put together into a checked RunConfig: Hydra composes, the sections check."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Sweep
from hydra.types import RunMode
from hydra.version import VersionBase, setbase
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from spd_hydra import config_errors
from spd_hydra.components import load_plugins
from spd_hydra.config import RunConfig, problems
from spd_hydra.overrides import (
    Groups,
    apply,
    chooses_group,
    group_problem,
    is_for_hydra,
    read,
    unreadable,
    with_entries,
    without_hydra,
)
from spd_hydra.section import ConfigError, Problem, checks_deferred

CONFIG_MODULE = "spd_hydra.conf"
CONFIG_NAME = "config"
HYDRA_VERSION_BASE = "1.3"
_SCHEMA_SUFFIX = "_schema"

ConfigStore.instance().store(name=f"run_config{_SCHEMA_SUFFIX}", node=RunConfig, provider="spd_hydra")


class Composer:
    """Composes any number of configurations; made by `open`."""

    @classmethod
    @contextlib.contextmanager
    def open(cls, config_dir: Path | str | None = None) -> Iterator["Composer"]:
        """A composer that is usable within the `with` block; afterwards Hydra's state is as before.

        Raises:
            ConfigError: the folder does not exist, or a plug-in cannot be loaded.
        """
        load_plugins()
        search_path = create_config_search_path(f"pkg://{CONFIG_MODULE}")
        if config_dir is not None:
            if not Path(config_dir).is_dir():
                raise ConfigError(f"--config-dir: there is no folder {config_dir}")
            anchor = SearchPathQuery(provider="schema")
            search_path.prepend("command-line", f"file://{Path(config_dir).absolute()}", anchor)
        others, version = GlobalHydra.instance().hydra, copy.copy(VersionBase.instance())
        GlobalHydra.instance().clear()
        setbase(HYDRA_VERSION_BASE)
        try:
            yield cls(Hydra.create_main_hydra2("spd-run", search_path))
        finally:
            GlobalHydra.instance().hydra = others
            VersionBase.set_instance(version)

    def __init__(self, hydra: Hydra) -> None:
        self._hydra = hydra

    def run_config(self, overrides: Sequence[str]) -> RunConfig:
        """The configuration with these overrides.

        Raises:
            ConfigError: lists everything that is wrong.
        """
        cfg = self.composed(overrides)
        config, found = _checked(cfg, {})
        if config is None or found:
            raise _error(_checked(cfg, self.groups()).problems)
        return config

    def composed(self, overrides: Sequence[str]) -> DictConfig:
        """What Hydra composes from these overrides, of the right types but otherwise unchecked.

        Raises:
            ConfigError: lists everything that is wrong.
        """
        try:
            return self._compose(overrides)
        except Exception as error:  # Hydra's own, OmegaConf's and plain ones, all of them about these words
            raise _error(self._diagnosis(overrides, error)) from error

    def is_sweep(self, overrides: Sequence[str]) -> bool:
        """Whether the configuration itself asks for several jobs, by `hydra.mode=MULTIRUN`."""
        return bool(self._hydra.get_mode(CONFIG_NAME, list(overrides)) is RunMode.MULTIRUN)

    def jobs(self, overrides: Sequence[str]) -> list[list[str]]:
        """The overrides of each job of a sweep, in the order in which Hydra's basic sweeper numbers them.

        Another sweeper chooses as it goes; then there is one job here, with all that it does not choose.

        Raises:
            ConfigError: an override cannot be read, or what it sweeps over does not exist.
        """
        try:
            parsed, takes_all = self._swept(overrides)
            if not takes_all:
                return [[str(item.input_line) for item in parsed if not item.is_sweep_override()]]
            _require_finite(parsed)
            jobs = BasicSweeper.split_arguments(parsed, None)[0]
        except ConfigError:
            raise
        except Exception as error:
            found = [unreadable(text) for text in overrides if read(text) is None]
            raise _error(found or [Problem("", explain(error))]) from error
        if not jobs:
            swept = [str(item.input_line) for item in parsed if item.is_sweep_override()]
            raise ConfigError(f"the sweep has no jobs: {' and '.join(swept)} matches nothing")
        return jobs

    def searched(self, overrides: Sequence[str]) -> list[str]:
        """The keys whose values another sweeper than Hydra's basic one chooses as it goes."""
        parsed, takes_all = self._swept(overrides)
        return [] if takes_all else [item.key_or_group for item in parsed if item.is_sweep_override()]

    def _swept(self, overrides: Sequence[str]) -> tuple[list[Override], bool]:
        """The overrides of a sweep's jobs, and whether every combination is a job."""
        master = self._compose([text for text in overrides if is_for_hydra(text)], keep_hydra=True)
        parameters = OmegaConf.select(master, "hydra.sweeper.params") or {}
        texts = [f"{key}={value}" for key, value in parameters.items()]
        parser = OverridesParser.create(config_loader=self._hydra.config_loader)
        parsed = parser.parse_overrides([*texts, *with_entries(without_hydra(overrides))])
        return parsed, str(OmegaConf.select(master, "hydra.sweeper._target_")).endswith(".BasicSweeper")

    def groups(self) -> dict[str, list[str]]:
        """Every config group with the options that a person may choose."""
        names = self._hydra.config_loader.list_groups("")
        return {name: self._options(name) for name in names if name != "hydra" and not name.startswith("_")}

    def _options(self, group: str) -> list[str]:
        sources = [source for source in self._hydra.config_loader.get_sources() if source.is_group(group)]
        found = {name for source in sources for name in source.list(group, ObjectType.CONFIG)}
        options = sorted(
            name for name in found if not name.startswith("_") and not name.endswith(_SCHEMA_SUFFIX)
        )
        for inner in sorted({name for source in sources for name in source.list(group, ObjectType.GROUP)}):
            if not inner.startswith("_"):
                options += [f"{inner}/{name}" for name in self._options(f"{group}/{inner}")]
        return options

    def _compose(self, overrides: Sequence[str], *, keep_hydra: bool = False) -> DictConfig:
        cfg: DictConfig = self._hydra.compose_config(
            CONFIG_NAME, with_entries(overrides), run_mode=RunMode.RUN, with_log_configuration=False
        )
        if not keep_hydra:
            with open_dict(cfg):
                del cfg["hydra"]
        return cfg

    def _diagnosis(self, overrides: Sequence[str], error: Exception) -> list[Problem]:
        """Everything that is wrong with these overrides; at least what the error says."""
        groups = self.groups()
        chosen, values, found = [], [], []
        for text in with_entries(overrides):
            override = read(text)
            if override is None:
                found.append(unreadable(text))
            elif is_for_hydra(text):
                chosen.append(text)
            elif not chooses_group(override, groups) or isinstance(override.value(), Sweep):
                values.append(override)
            elif problem := group_problem(override, groups[override.key_or_group]):
                found.append(problem)
            else:
                chosen.append(text)
        try:
            cfg = self._compose(chosen)
        except Exception as other:
            return found or [Problem("", explain(other))]
        found += apply(cfg, values, groups)
        told = {problem.key for problem in found}
        found += [one for one in _checked(cfg, groups).problems if one.key.rpartition(".")[0] not in told]
        return found or [Problem("", explain(error))]


def to_run_config(cfg: DictConfig) -> RunConfig:
    """The checked RunConfig of what Hydra composed.

    Raises:
        ConfigError: lists every unknown key, missing value and value out of range.
    """
    config, found = _checked(cfg, {})
    if config is None or found:
        raise _error(found)
    return config


def apply_overrides(
    saved: RunConfig, overrides: Sequence[str], *, config_dir: Path | str | None = None
) -> RunConfig:
    """A saved configuration with what was typed to go on with it.

    Choosing another option of a group (`logger=wandb`) replaces that section.

    Args:
        saved: as it was saved with a run.
        overrides: as on the command line; those for Hydra itself are passed over.
        config_dir: a further folder of YAML files, as `--config-dir`.

    Raises:
        ConfigError: lists everything that is wrong.
    """
    cfg = OmegaConf.structured(saved)
    values, found = [], []
    with Composer.open(config_dir) as composer:
        groups = composer.groups()
        for text in with_entries(without_hydra(overrides)):
            override = read(text)
            if override is None:
                found.append(unreadable(text))
            elif not chooses_group(override, groups):
                values.append(override)
            elif override.key_or_group not in cfg:
                found.append(Problem(override.key_or_group, "a run that goes on keeps its own; leave it out"))
            elif problem := group_problem(override, groups[override.key_or_group]):
                found.append(problem)
            else:
                cfg[override.key_or_group] = composer.composed([text])[override.key_or_group]
    found += apply(cfg, values, groups)
    config, wrong = _checked(cfg, groups)
    if config is None or found or wrong:
        raise _error([*found, *wrong])
    return config


def explain(error: BaseException) -> str:
    """What Hydra or OmegaConf says, in one line, without advice that does not fit here."""
    texts = [str(error), str(error.__cause__ or "")]
    lines = [line.strip() for text in texts for line in text.splitlines() if line.strip()]
    noise = (
        "See https",
        "Set the env",
        "object_type",
        "reference_type",
        "full_key",
        "provider=",
        "Config search",
    )
    return "; ".join(dict.fromkeys(line for line in lines if not line.startswith(noise)))


class _Checked(NamedTuple):
    config: RunConfig | None
    problems: list[Problem]


def _checked(cfg: DictConfig, groups: Groups) -> _Checked:
    """The RunConfig of a composed configuration, and everything that is wrong with it."""
    clean, found = _declared(cfg), []
    if not cfg.get("allow_extra"):
        for key in config_errors.unknown_in_sections(cfg):
            message = config_errors.unknown_key(key, clean, groups)
            found.append(Problem(key, f"{message} (allow_extra=true accepts and ignores it)"))
    missing = [key for key in config_errors.full_keys(clean) if _is_missing(clean, key)]
    found += [Problem(key, config_errors.missing_value(key, clean, groups.get(key, []))) for key in missing]
    if missing:
        return _Checked(None, found)
    try:
        with checks_deferred():
            config = cast(RunConfig, OmegaConf.to_object(clean))
    except OmegaConfBaseException as error:
        return _Checked(None, [*found, Problem(str(getattr(error, "full_key", None) or ""), explain(error))])
    return _Checked(config, [*found, *problems(config)])


def _is_missing(cfg: DictConfig, key: str) -> bool:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return node is not None and OmegaConf.is_missing(node, name)  # None: a dot in the name of an entry


def _declared(cfg: DictConfig) -> DictConfig:
    """The configuration without keys that no section declares."""
    extra = list(config_errors.unknown_in_sections(cfg))
    clean = cfg.copy() if extra else cfg
    for key in extra:
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(clean, parent) if parent else clean
        with open_dict(node):
            del node[name]
    return clean


def _require_finite(parsed: Sequence[Override]) -> None:
    """Refuse intervals, of which no combinations can be listed.

    Raises:
        ConfigError: one of the values is an interval.
    """
    for item in parsed:
        if isinstance(item.value(), IntervalSweep):
            key, _, value = str(item.input_line).partition("=")
            raise ConfigError(
                f"{key}: got {value}, which needs a sweeper that chooses as it goes, hydra/sweeper=…; for a "
                f"grid list the values, as {key}=1,2,4"
            )


def _error(found: Sequence[Problem]) -> ConfigError:
    return ConfigError("\n".join(dict.fromkeys(str(problem) for problem in found)))
