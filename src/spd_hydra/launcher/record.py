"""What a sweep's directory says of its jobs: which there are, what each runs, who runs them now.

sweep.json     the jobs, their words, and under which ids they were submitted
configs.json   the configuration of each, as it was composed
launcher.yaml  how they were started last
.lock          held by the process that runs them on this machine
"""

import contextlib
import dataclasses
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import yaml

from spd_hydra import atomic
from spd_hydra.config import RunConfig
from spd_hydra.launcher_config import Launcher
from spd_hydra.lock import FileLock, LockedError
from spd_hydra.redaction import redact, redact_words
from spd_hydra.run_files import LOCK, cannot
from spd_hydra.saved_config import KIND, to_dict
from spd_hydra.section import ConfigError, registered
from spd_hydra.sources import from_sources, sources

FILE = "sweep.json"
CONFIGS = "configs.json"
LAUNCHER = "launcher.yaml"
SUBMITIT = ".submitit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One job of a sweep, which runs in `<sweep>/<number>`.

    Attributes:
        id: the scheduler's, or that of its process on this machine, if it has one.
        launcher: the kind that started it, where that is not the sweep's.
        said_before: the time that the status in its directory had when it was started again; as long as it
            has that, it tells of before. Clocks of two machines are not compared.
    """

    number: int
    overrides: list[str]
    experiment: str
    seed: int
    steps: int
    id: str | None = None
    launcher: str | None = None
    said_before: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepRecord:
    """What is known of a sweep from the moment of its submission.

    Attributes:
        launcher: kind of launcher: `local`, `local_parallel` or `slurm`.
        ranks: processes of each job.
        command: the command line, without secrets.
        code: digest of the sources at submission; `environment.json` beside this file has commit and diff.
    """

    launcher: str
    ranks: int
    command: str
    code: str
    jobs: list[SweepJob]

    def write(self, sweep_dir: Path) -> None:
        """Write sweep.json, replacing an older one.

        Raises:
            RunDirectoryError: the disk is full or read-only.
        """
        _replace(sweep_dir / FILE, json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, sweep_dir: Path) -> "SweepRecord":
        """What `write` wrote.

        Raises:
            ConfigError: there is no sweep, or it cannot be read.
        """
        try:
            data: dict[str, Any] = json.loads((sweep_dir / FILE).read_text(encoding="utf-8"))
            jobs = [SweepJob(**job) for job in data.pop("jobs")]
            if not all(isinstance(job.number, int) for job in jobs):
                raise ValueError("the number of a job is none")  # it names the directory of its run
            return cls(jobs=jobs, **data)
        except FileNotFoundError:
            raise ConfigError(f"sweep: {sweep_dir} is no directory of a sweep: it holds no {FILE}") from None
        except OSError as error:
            raise ConfigError(f"sweep: {sweep_dir / FILE} cannot be read: {error.strerror}") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"sweep: {sweep_dir / FILE} is damaged: {error}") from None

    def with_jobs(self, jobs: Sequence[SweepJob]) -> "SweepRecord":
        """The record with these jobs in place of those of the same number, and added to the others."""
        numbers = {job.number for job in jobs}
        kept = [job for job in self.jobs if job.number not in numbers]
        return dataclasses.replace(self, jobs=sorted([*kept, *jobs], key=lambda job: job.number))

    def launcher_of(self, job: SweepJob | None) -> str:
        """The kind of launcher that started a job."""
        return self.launcher if job is None or job.launcher is None else job.launcher

    def followed_by(self, later: "SweepRecord") -> "SweepRecord":
        """The record of the same sweep after jobs of it, or further ones, were started as `later` says."""
        before = [dataclasses.replace(job, launcher=self.launcher_of(job)) for job in self.jobs]
        before = before if later.launcher != self.launcher else self.jobs
        return dataclasses.replace(later, command=self.command, jobs=before).with_jobs(later.jobs)


def write_configs(sweep_dir: Path, configs: Mapping[int, RunConfig], launcher: Launcher) -> None:
    """Keep what jobs were composed to, beside that of others, and how they are started: to go on from there.

    Paths are written whole. Secrets are not written: a job with one cannot begin from here.

    Raises:
        RunDirectoryError: the disk is full or read-only.
    """
    there = _json_of(sweep_dir / CONFIGS) or {}
    new = {str(number): _plain(config) for number, config in configs.items() if config.run is None}
    if new and there | new != there:
        _replace(sweep_dir / CONFIGS, json.dumps(there | new))
    _replace(sweep_dir / LAUNCHER, yaml.safe_dump(redact(to_dict(launcher)), sort_keys=False))


def read_configs(sweep_dir: Path) -> dict[int, dict[str, Any]]:
    """What `write_configs` kept, by job, as plain data; empty where there is nothing that can be read."""
    found = _json_of(sweep_dir / CONFIGS) or {}
    return {int(name): data for name, data in found.items() if name.isdecimal() and isinstance(data, dict)}


def launcher_data(sweep_dir: Path) -> dict[str, Any] | None:
    """What `write_configs` kept of the launcher, as plain data; None where there is nothing to be read."""
    try:
        found = yaml.safe_load((sweep_dir / LAUNCHER).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return found if isinstance(found, dict) else None


def launcher_in(sweep_dir: Path, kind: str | None = None) -> Launcher:
    """What the jobs of a sweep were asked with, for words that are printed: nothing ends because of them.

    Args:
        sweep_dir: the directory of the sweep.
        kind: of the launcher; where the file tells of another, or of none, one as it is by default.
    """
    kinds = cast(dict[str, type[Launcher]], registered("launcher"))
    data = launcher_data(sweep_dir) or {}
    try:
        found = kinds[str(data.pop(KIND, None)).rpartition("/")[2]](**data)
    except (KeyError, TypeError, AttributeError, ValueError, ConfigError):
        found = Launcher()
    return found if kind in {None, found.kind} else kinds.get(str(kind), Launcher)()


def _plain(config: RunConfig) -> dict[str, Any]:
    whole = from_sources(config, sources(config))
    if whole.resume is not None:
        whole = dataclasses.replace(whole, resume=str(Path(whole.resume).absolute()))
    return dict(redact(to_dict(whole)))


def _json_of(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _replace(path: Path, text: str) -> None:
    try:
        atomic.replace(path, text)
    except OSError as error:
        raise cannot("write", path, error) from error


@contextlib.contextmanager
def held(sweep_dir: Path) -> Iterator[None]:
    """Within the block this process runs the jobs of a sweep, and no other may.

    Raises:
        ConfigError: another process does, or nothing can be written there.
    """
    try:
        lock = FileLock(sweep_dir / LOCK)
    except LockedError as error:
        raise ConfigError(
            f"resume: the jobs of {sweep_dir} are run by {error}; wait for its end, or stop it first"
        ) from None
    except OSError as error:
        raise ConfigError(unwritable(sweep_dir, error)) from error
    try:
        yield
    finally:
        lock.release()


def is_held(sweep_dir: Path) -> bool:
    """Whether some process runs the jobs of a sweep on this machine."""
    return FileLock.is_held(sweep_dir / LOCK) is True


def make(sweep_dir: Path) -> None:
    """Make the directory of a sweep.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        sweep_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(unwritable(sweep_dir, error)) from error


def unwritable(sweep_dir: Path, error: OSError) -> str:
    """What a user is told where no sweep can be."""
    return f"{sweep_dir}: the sweep cannot be written there: {error.strerror}"


def new_sweep_directory(out_dir: str) -> Path:
    """A name for the directory of a new sweep."""
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_{secrets.token_hex(3)}"
    return Path(out_dir).expanduser().absolute() / "sweeps" / name


def submission_folder(sweep_dir: Path) -> Path:
    """The folder of scripts, pickles and logs, which only its owner may enter: the job unpickles from there.

    Raises:
        ConfigError: it belongs to somebody else, or is a link or a file.
    """
    folder = sweep_dir / SUBMITIT
    try:
        folder.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass
    except OSError as error:
        raise ConfigError(unwritable(sweep_dir, error)) from error
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise ConfigError(f"{folder} is a link, a file, or belongs to somebody else; choose another out_dir")
    folder.chmod(0o700)
    return folder


def log_paths(folder: Path, job_id: str, rank: int = 0) -> tuple[Path, Path]:
    """Standard output and standard error of a rank of a job, as submitit names them."""
    return folder / f"{job_id}_{rank}_log.out", folder / f"{job_id}_{rank}_log.err"


def hide_secrets(sweep: Path) -> None:
    """Take secrets out of the file in which Hydra writes down the words of a sweep as they were typed."""
    path = sweep / "multirun.yaml"
    try:
        record = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    shown = redact_words(record)
    if shown != record:
        try:
            atomic.replace(path, yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))
        except OSError:  # a full disk: better no record than one with secrets
            path.unlink(missing_ok=True)
