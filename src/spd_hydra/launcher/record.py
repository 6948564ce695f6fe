"""sweep.json: which jobs a sweep has and under which ids they were submitted."""

import contextlib
import dataclasses
import json
import os
import secrets
import stat
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from spd_hydra import atomic
from spd_hydra.redaction import redact_words
from spd_hydra.section import ConfigError

FILE = "sweep.json"
SUBMITIT = ".submitit"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepJob:
    """One job of a sweep, which runs in `<sweep>/<number>`; its `id` is the scheduler's, if it has one."""

    number: int
    overrides: list[str]
    experiment: str
    seed: int
    steps: int
    id: str | None = None


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
        """Write sweep.json, replacing an older one."""
        atomic.replace(sweep_dir / FILE, json.dumps(dataclasses.asdict(self), indent=1))

    @classmethod
    def read(cls, sweep_dir: Path) -> "SweepRecord":
        """What `write` wrote.

        Raises:
            ConfigError: there is no sweep, or it cannot be read.
        """
        try:
            data: dict[str, Any] = json.loads((sweep_dir / FILE).read_text(encoding="utf-8"))
            jobs = [SweepJob(**job) for job in data.pop("jobs")]
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
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700, parents=True)
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
        shown = redact_words(record)
        if shown != record:
            atomic.replace(path, yaml.safe_dump(shown, sort_keys=False, allow_unicode=True))
    except FileNotFoundError:
        pass
