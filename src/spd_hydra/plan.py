"""The jobs that a command line asks for, all composed and checked before the first one starts."""

import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from spd_hydra import suite
from spd_hydra.composer import Composer
from spd_hydra.composition import Job, compose_job
from spd_hydra.config import RunConfig, Task
from spd_hydra.launcher_config import Background
from spd_hydra.overrides import read, with_entries, without_hydra
from spd_hydra.preflight import is_begun, preflight
from spd_hydra.saved_config import KIND, to_dict, to_yaml
from spd_hydra.search_objective import degenerate
from spd_hydra.section import ConfigError
from spd_hydra.start import pinned_start
from spd_hydra.terminal import show

log = logging.getLogger(__name__)


_MANY_JOBS = 50  # whose check takes more than a few seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a command line asks for: one job, or the jobs of a sweep."""

    overrides: list[str]
    jobs: list[Job]
    is_sweep: bool


def make_plan(
    composer: Composer, overrides: Sequence[str], *, multirun: bool, config_dir: Path | str | None = None
) -> Plan:
    """Compose and check everything that is asked for.

    Raises:
        ConfigError: lists everything that is wrong, for a sweep job by job.
    """
    words = suite.expanded(composer, overrides)
    is_sweep = multirun or words != list(overrides) or composer.is_sweep(words)
    if not is_sweep:
        job = compose_job(composer, words, config_dir)
        job = _pinned(job)
        _warn([misnamed(composer, job)])
        if _starts_processes(job.config):  # a run in this process checks this itself
            preflight(job.config)
        return Plan(overrides=with_entries(words), jobs=[job], is_sweep=False)
    jobs: list[Job] = []
    wrong: dict[str, list[int]] = {}
    built: set[str] = set()
    settings = composer.jobs(words)
    searched = composer.searched(words) if len(settings) == 1 else []  # of one that chooses there is one
    if len(settings) > _MANY_JOBS:
        show(f"checking {len(settings)} jobs before the first one starts", sys.stderr)
    for number, setting in enumerate(settings):
        try:
            job = _pinned(compose_job(composer, setting, config_dir))
            layout = to_yaml(dataclasses.replace(job.config, seed=0))
            if layout not in built and job.config.task is not Task.analyse:  # which looks at the run itself
                preflight(job.config)
                built.add(layout)
            jobs.append(job)
        except ConfigError as error:
            for line in str(error).splitlines():
                wrong.setdefault(line, []).append(number)
    if wrong:
        names = _names(settings)
        raise ConfigError(
            "\n".join(
                _labelled(line, [names[number] for number in numbers], len(settings))
                for line, numbers in wrong.items()
            )
        )
    require_one_launcher(jobs)
    _require_one_place(jobs)
    _warn([degenerate(jobs[0].config.objective, searched), *(misnamed(composer, job) for job in jobs)])
    return Plan(overrides=with_entries(words), jobs=jobs, is_sweep=True)


def _pinned(job: Job) -> Job:
    """The job with the checkpoint that `start_from` means now: one for all jobs of a sweep."""
    if is_begun(job.config):
        return job
    return dataclasses.replace(job, config=pinned_start(job.config))


def misnamed(composer: Composer, job: Job) -> str | None:
    """What to say of a run that is named after an experiment whose model was replaced."""
    given = {override.key_or_group: text for text in job.overrides if (override := read(text)) is not None}
    if job.saved is not None or "model" not in given or "name" in given:
        return None
    own = composer.run_config([given["experiment"]] if "experiment" in given else [])
    if type(own.model) is type(job.config.model) and own.model == job.config.model:
        return None
    return (
        f"name: got {job.config.name}, which is that of an experiment on another model; with "
        f"{given['model']} give the run a name of its own, name=…: else it lies in the folder of "
        f"{job.config.name} and is compared with what is published of that"
    )


def _warn(remarks: Sequence[str | None]) -> None:
    for text in dict.fromkeys(remarks):
        if text is not None:
            log.warning(text)


def _starts_processes(config: RunConfig) -> bool:
    has_parts = config.task in {Task.decompose, Task.train_target}
    return has_parts and (isinstance(config.launcher, Background) or config.launcher.local_ranks > 1)


def require_one_launcher(jobs: Sequence[Job]) -> None:
    """Refuse a sweep over what is asked of the cluster: all jobs of an array have the same.

    Raises:
        ConfigError: names the keys with their values.
    """
    given: dict[str, list[str]] = {}
    for job in jobs:
        for key, value in to_dict(job.config.launcher).items():
            given.setdefault(key, []).append(str(value))
    varying = {key: list(dict.fromkeys(values)) for key, values in given.items() if len(set(values)) > 1}
    if KIND in varying:
        varying = {KIND: varying[KIND]}
    if varying:
        raise ConfigError(
            "\n".join(
                f"launcher{'' if key == KIND else f'.{key}'}: got {', '.join(values)} in one sweep, must be "
                "the same for all its jobs; start a sweep for each"
                for key, values in varying.items()
            )
        )


def _require_one_place(jobs: Sequence[Job]) -> None:
    places = list(dict.fromkeys(job.config.out_dir for job in jobs))
    if len(places) > 1:
        raise ConfigError(
            f"out_dir: got {', '.join(places)} in one sweep, whose jobs lie in one folder; start a sweep for "
            "each, or put a path with a comma in quotes: 'out_dir=\"a,b\"'"
        )


def _names(settings: Sequence[Sequence[str]]) -> list[str]:
    """Every job's number with what it does not share with all the others: `1 (seed=0)`."""
    common = set(settings[0]).intersection(*settings)
    own = [" ".join(word for word in without_hydra(setting) if word not in common) for setting in settings]
    return [f"{number} ({words})" if words else str(number) for number, words in enumerate(own)]


def _labelled(message: str, names: Sequence[str], total: int) -> str:
    if len(names) == total:
        return message
    label = f"job {names[0]}" if len(names) == 1 else f"jobs {', '.join(names)}"
    return f"{label}: {message}"
