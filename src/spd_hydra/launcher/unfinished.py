"""What is left of a sweep that ended before all its jobs had: which jobs, how they go on, by which launcher.

The directory may be somebody else's: what it says is taken as data. Configurations are read as those of runs
are; shell lines and options of sbatch that its launcher had are not taken unasked.
"""

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_hydra.command_word import command_word
from spd_hydra.composer import Composer
from spd_hydra.composition import Job
from spd_hydra.config import RunConfig
from spd_hydra.launcher import record as files
from spd_hydra.launcher.record import SweepJob, SweepRecord
from spd_hydra.launcher.watch import OPEN
from spd_hydra.launcher_config import Launcher
from spd_hydra.overrides import assignment, read
from spd_hydra.redaction import HIDDEN
from spd_hydra.report.sweep import SweepRow
from spd_hydra.run_dir import RunDirectory
from spd_hydra.run_files import CONFIG
from spd_hydra.saved_config import KIND, from_dict, load_config
from spd_hydra.saved_run import require_trust
from spd_hydra.section import ConfigError, registered

_RUN_ANYTHING = ("setup", "additional")
"""Keys of a launcher that can run any command on a node."""

_TRUST = "trust_remote_code"


def is_open(sweep_dir: Path, row: SweepRow) -> bool:
    """Whether a job waits or runs, by itself or because somebody goes on with its run."""
    if row.state in OPEN:
        return True
    directory = sweep_dir / str(row.job)
    is_begun = row.state != "done" and (directory / CONFIG).is_file()
    return is_begun and RunDirectory.view(directory).is_being_written() is True


def to_do(sweep_dir: Path, rows: Sequence[SweepRow]) -> list[int]:
    """The jobs that stopped, failed, were killed or never began."""
    return [row.job for row in rows if row.state != "done" and not is_open(sweep_dir, row)]


def line_to_type(sweep_dir: Path) -> str | None:
    """What goes on with a sweep; None where its directory does not say how its jobs were composed."""
    if not files.read_configs(sweep_dir):
        return None
    launcher = files.launcher_data(sweep_dir) or {}
    again = [assignment(f"launcher.{key}", launcher[key]) for key in _RUN_ANYTHING if launcher.get(key)]
    return " ".join(["spd-run", command_word("resume", sweep_dir), *map(shlex.quote, again)])


def launcher_for(composer: Composer, sweep_dir: Path, kind: str, overrides: Sequence[str]) -> Launcher:
    """The launcher of the rest: the sweep's own with what was typed, or the one that was typed.

    Args:
        composer: composes it.
        sweep_dir: the directory of the sweep.
        kind: of the launcher that the sweep had.
        overrides: as they were typed.

    Raises:
        ConfigError: words that a sweep which goes on does not take, or a launcher that cannot be.
    """
    words = [(text, word.key_or_group if (word := read(text)) is not None else text) for text in overrides]
    others = [
        text
        for text, key in words
        if key not in {"resume", _TRUST, "launcher"} and not key.startswith("launcher.")
    ]
    if others:
        raise ConfigError(
            f"resume={sweep_dir}: a sweep goes on as it was planned, so it takes words of the launcher and "
            f"{_TRUST} only; leave out {' '.join(others)}, or go on with one of its runs: "
            f"{command_word('resume', sweep_dir)}/<number>"
        )
    typed = [text for text, key in words if key == "launcher" or key.startswith("launcher.")]
    if not any(key == "launcher" for _, key in words):
        typed = [*_own_words(sweep_dir, kind, [key for _, key in words]), *typed]
    return composer.run_config(typed).launcher


def is_trusted(overrides: Sequence[str]) -> bool:
    """Whether it was typed that Python code which comes with a model may run."""
    words = [word for word in map(read, overrides) if word is not None and word.key_or_group == _TRUST]
    return bool(words) and words[-1].value() is True


def jobs_of(
    sweep_dir: Path, record: SweepRecord, numbers: Sequence[int], launcher: Launcher, *, trusted: bool
) -> dict[int, Job]:
    """These jobs as they go on: begun ones as their directories say, the others as they were composed.

    Raises:
        ConfigError: lists every job that cannot go on, with the reason.
    """
    configs = files.read_configs(sweep_dir)
    known = {job.number: job for job in record.jobs}
    found, wrong = {}, []
    for number in numbers:
        try:
            config = _config_of(sweep_dir, number, configs.get(number))
            require_trust(sweep_dir / str(number), config, trusted=trusted, yes=f"add {_TRUST}=true")
            config = dataclasses.replace(config, launcher=launcher)
        except ConfigError as error:
            wrong += [f"job {number}: {line}" for line in str(error).splitlines()]
        else:
            found[number] = Job(overrides=_words(known.get(number)), config=config)
    if wrong:
        raise ConfigError("\n".join(wrong))
    return found


def _config_of(sweep_dir: Path, number: int, composed: Mapping[str, Any] | None) -> RunConfig:
    directory = sweep_dir / str(number)
    is_elsewhere = composed is not None and composed.get("resume") is not None
    if not is_elsewhere and directory.is_symlink():
        raise ConfigError(f"resume: {directory} is a link, which may lead out of the sweep")
    if not is_elsewhere and (directory / CONFIG).exists():
        return load_config(directory / CONFIG)
    if composed is None:
        raise ConfigError(
            f"resume: {sweep_dir} does not say how this job was composed, as that of task=analyse or of an "
            "earlier version; start it anew"
        )
    if HIDDEN in str(composed):
        raise ConfigError(
            "resume: its configuration held a secret, which was not written down; start it anew"
        )
    return from_dict(composed)


def _words(job: SweepJob | None) -> list[str]:
    return [] if job is None else job.overrides


def _own_words(sweep_dir: Path, kind: str, typed: Sequence[str]) -> list[str]:
    """The words that make the launcher which the sweep had."""
    data = files.launcher_data(sweep_dir) or {KIND: f"launcher/{kind}"}
    path = sweep_dir / files.LAUNCHER
    name = str(data.get(KIND)).removeprefix("launcher/")
    values = {key: value for key, value in data.items() if key != KIND}
    if name not in registered("launcher") or any("${" in str(v) or "\n" in str(v) for v in values.values()):
        raise ConfigError(f"{path} is damaged; choose a launcher, e.g. launcher=local")
    for key in _RUN_ANYTHING:
        if values.get(key) and not any(f"{word}.".startswith(f"launcher.{key}.") for word in typed):
            given = shlex.quote(assignment(f"launcher.{key}", values[key]))
            raise ConfigError(
                f"launcher.{key}: the sweep had one, which can run any command and is not taken from {path} "
                f"unasked; type it again, {given}, or choose a launcher with launcher="
            )
    kept = {key: value for key, value in values.items() if key not in _RUN_ANYTHING}
    return [f"launcher={name}", *(assignment(f"launcher.{key}", value) for key, value in kept.items())]
