"""`spd-run --help`: examples, presets, and one line for every key, from the sections themselves."""

import dataclasses
import enum
import inspect
import textwrap
import typing
from collections.abc import Iterator
from importlib import resources
from typing import Any

from omegaconf import MISSING

from spd_hydra.composer import CONFIG_MODULE, Composer
from spd_hydra.config import RunConfig
from spd_hydra.config_errors import bounds_text
from spd_hydra.section import Section, registered

_WIDTH = 110
_INTRO = """\
spd-run: decompose the weights of a neural network into rank-one subcomponents (SPD)

  spd-run                                              the default, experiment=tms_5-2, on this machine
  spd-run experiment=resid_mlp1 seed=3 decomposition.sites.mlp_in.C=200 loss.importance_minimality.coeff=2e-5
  spd-run -m experiment=tms_5-2,tms_40-10 'seed=range(5)'      a sweep: every combination, a table at the end
  spd-run -m suite=paper 'seed=range(5)'               the paper's seven toys, beside what it reports of them
  spd-run resume=<run dir> train.steps=30000           go on with a run, with its saved configuration
  spd-run start_from=<run dir or checkpoint> train.lr=1e-4        a new run from where another one was
  spd-run run_dir=<directory>                          begin a run there, or go on with the one that is there
  spd-run debug=smoke                                  the whole path in seconds, to see that it works

  spd-run -m launcher=slurm launcher.partition=gpu launcher.time=12:00:00 seed=0,1    the same on a cluster
  spd-run launcher=slurm launcher.dry_run=true         show the sbatch script, submit nothing
  spd-run task=sweep_status sweep=<sweep dir>          how the jobs of a sweep stand
  spd-run -m launcher=local_parallel launcher.jobs=4 'seed=range(8)'     four at once on this machine
  spd-run task=train_target experiment=tms_40-10       only the target
  spd-run task=analyse run=<run dir>                   metrics, figures, report and summary again
  spd-run task=check experiment=resid_mlp3             build everything, train nothing
  spd-run task=prefetch experiment=lm_hf model.name=gpt2 data.name=imdb    fetch what a run needs
  spd-run --cfg job experiment=resid_mlp1              show the configuration
  spd-run --info defaults-tree                         show which files it comes from
  spd-run --config-dir <folder> experiment=<mine>      with YAML files of your own, in <folder>/experiment/
  eval "$(spd-run -sc install=bash)"                   completion with Tab; fish and zsh as well

Later beats earlier: defaults, experiment, conf/local/default.yaml if you wrote one, debug, command line.
Choose a group with loss=delta, set a key with loss.stochastic_recon.coeff=0.5. Lists are written [64,32].
Exit codes: 0 all well, 1 the run failed, 2 bad configuration, 3 jobs of a sweep failed, 130 interrupted,
143 stopped by SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2."""


def help_text(composer: Composer) -> str:
    """Everything that can be typed: examples, presets, groups with their options, all keys."""
    groups = composer.groups()
    experiments = groups.pop("experiment")
    width = max(len(name) for name in experiments) + 2
    lines = [_INTRO, "", "EXPERIMENTS (experiment=...)"]
    lines += [f"  {name:{width}}{description(f'experiment/{name}')}" for name in experiments]
    lines += ["", "GROUPS (group=option)"]
    for name, options in groups.items():
        lines += textwrap.wrap(
            f"{name:{width}}{', '.join(options)}",
            _WIDTH,
            initial_indent="  ",
            subsequent_indent=" " * (width + 2),
            break_long_words=False,
            break_on_hyphens=False,
        )
    lines += ["", "KEYS (key=value): value in the default experiment, meaning, range"]
    return "\n".join([*lines, *_Keys().of(RunConfig, "", composer.run_config([]))])


def description(name: str) -> str:
    """The first comment of one of the shipped YAML files, its meaning in one line."""
    path = resources.files(CONFIG_MODULE).joinpath(f"{name}.yaml")
    if not path.is_file():
        return ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @"):
            return line.removeprefix("# ")
    return ""


class _Keys:
    """Lists keys; a section that occurs at several places is listed once and then referred to."""

    def __init__(self) -> None:
        self._listed: dict[type[Section], str] = {}

    def of(self, cls: type[Section], prefix: str, values: Section | None) -> Iterator[str]:
        """The lines of a section: its own keys, then the sections inside it."""
        self._listed[cls] = prefix
        inside: list[tuple[dataclasses.Field[Any], type[Section], str]] = []
        types = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            key = f"{prefix}{field.name}"
            section, suffix = _section_of(types[field.name])
            if section is None:
                yield _line(key, _shown_default(field, values), field)
            else:
                inside.append((field, section, f"{key}{suffix}."))
        for field, section, below in inside:
            kinds = registered(field.name) if not prefix else {}
            meaning = field.metadata.get("help", "")
            inner = getattr(values, field.name) if values is not None else _default(field)
            if not prefix:
                yield ""
            if kinds:
                yield f"  {below[:-1]}: {meaning}"
                for kind, chosen in kinds.items():
                    yield f"  {below[:-1]} of kind {kind}: {_first_line(chosen)}"
                    yield from self.of(chosen, below, inner if type(inner) is chosen else None)
            elif section in self._listed:
                same = self._listed[section]
                like = "" if same == below else f"; keys as {same}*"
                yield f"    {below + '*':46}{meaning}{like}"
            else:
                yield f"  {below[:-1]}: {meaning}"
                yield from self.of(section, below, inner if isinstance(inner, section) else None)


def _section_of(annotation: Any) -> tuple[type[Section] | None, str]:
    """The section that a field holds, and `.<name>` if it holds any number of them by name."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation, ""
    if typing.get_origin(annotation) is dict:
        element = typing.get_args(annotation)[1]
        if isinstance(element, type) and issubclass(element, Section):
            return element, ".<name>"
    return None, ""


def _line(key: str, default: str, field: dataclasses.Field[Any]) -> str:
    limits = bounds_text(field)
    meaning = field.metadata.get("help", "") + (f" ({limits})" if limits else "")
    return f"    {key:46}{default:18} {meaning}"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _shown_default(field: dataclasses.Field[Any], values: Section | None) -> str:
    value = getattr(values, field.name) if values is not None else _default(field)
    if value is dataclasses.MISSING or value == MISSING:
        return "-"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    if isinstance(value, dict):  # as it would be typed
        return f"{{{','.join(f'{name}:{item}' for name, item in value.items())}}}"
    return str(value)


def _first_line(cls: type[Section]) -> str:
    return (inspect.getdoc(cls) or "").partition("\n")[0]
