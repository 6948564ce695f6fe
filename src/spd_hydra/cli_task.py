"""What happens in one job: the run, and its errors in words and exit codes."""

import errno
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from spd_hydra.checkpoint import CheckpointError
from spd_hydra.composer import Composer, to_run_config
from spd_hydra.composition import Job, compose_job
from spd_hydra.config_errors import invalid
from spd_hydra.environment import command_line
from spd_hydra.exit_code import ExitCode
from spd_hydra.launcher.job import RunJob, begin_or_go_on, link
from spd_hydra.launcher.record import hide_secrets
from spd_hydra.model.weights import WeightsError
from spd_hydra.plan import Plan
from spd_hydra.preflight import preflight
from spd_hydra.report.sweep import SweepRow
from spd_hydra.result import Outcome
from spd_hydra.run import RunError, run
from spd_hydra.run_dir import RunDirectoryError
from spd_hydra.run_files import CONFIG, cannot
from spd_hydra.saved_config import to_dict
from spd_hydra.section import ConfigError
from spd_hydra.stop import Stopped

_log = logging.getLogger(__name__)

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}


class Done(NamedTuple):
    """What a job came to: exit code, objective (NaN where there is none), and what went wrong."""

    code: ExitCode
    objective: float
    error: str | None = None


class Task:
    """The function that Hydra calls for each job.

    Under Hydra's own launcher no exception leaves it, since that would end the sweep; `codes` holds what each
    job came to. Under submitit's, which calls it on a node, exceptions pass.

    Args:
        command: the command line as it was typed, for the record.
        plan: the jobs as they were composed and checked.
        config_dir: as `--config-dir`.
        on_start: told the number and the job, as it is run, of each job of a sweep in this process.

    Attributes:
        codes: exit codes by job, of jobs in this process.
        errors: why some of them failed.
        ended: how jobs in processes of their own ended.
        failure: why they could not be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        plan: Plan | None,
        config_dir: str | None,
        on_start: Callable[[int, Job], None] | None = None,
    ) -> None:
        self.command = list(command)
        self.codes: dict[int, ExitCode] = {}
        self.errors: dict[int, str] = {}
        self.ended: list[SweepRow] = []
        self.failure: ConfigError | None = None
        self._plan = plan
        self._config_dir = config_dir
        self._on_start = on_start

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_plan": None, "_on_start": None}  # a node plans nothing

    def __call__(self, cfg: DictConfig) -> float:
        """Run one job; its objective, for those who optimise over runs, NaN where there is none."""
        hydra = HydraConfig.get()
        if hydra.mode is not RunMode.MULTIRUN:
            assert self._plan is not None, "a single run is planned before Hydra starts it"
            job = self._plan.jobs[0]
            self.codes[0], value, _ = guarded(lambda: self._run(job, None))
            return value
        hide_secrets(Path(hydra.sweep.dir))
        overrides = [str(text) for text in OmegaConf.to_container(hydra.overrides.task) or []]
        directory = Path(hydra.runtime.output_dir)
        if not hydra.launcher._target_.endswith(".BasicLauncher"):
            return _objective(self._as_job(self._swept(cfg, overrides), directory).outcome())
        return self.do(int(hydra.job.num), lambda: self.planned(overrides), directory)

    def do(self, number: int, planned: Callable[[], Job], directory: Path) -> float:
        """Run one job of a sweep in this process, or go on with it.

        Raises:
            Stopped: the run is whole, but a signal that came too late for it asked for no more.
        """
        late: list[Stopped] = []

        def work() -> Outcome:
            job = planned()
            if self._on_start is not None:
                self._on_start(number, job)
            outcome = self._run(job, directory)
            late.extend([outcome.late_stop] if outcome.late_stop is not None else [])
            return outcome

        self.codes[number], value, error = guarded(work)
        if error is not None:
            self.errors[number] = error
        for stopped in late:
            raise stopped
        return value

    def planned(self, overrides: list[str]) -> Job:
        """The job with these overrides, composed and checked.

        Raises:
            ConfigError: a sweeper chose values that are not allowed.
        """
        for job in self._plan.jobs if self._plan is not None else []:
            if job.overrides == overrides:
                return job
        with Composer.open(self._config_dir) as composer:
            job = compose_job(composer, overrides, self._config_dir)
        preflight(job.config)
        return job

    def _swept(self, cfg: DictConfig, overrides: list[str]) -> Job:
        if cfg.resume is None:
            config = to_run_config(cfg)
            if config.run is None:
                return Job(overrides=overrides, config=config)
        return self.planned(overrides)  # what a saved run says is not composed by Hydra

    def _run(self, job: Job, directory: Path | None) -> Outcome:
        directory = job.config.own_directory if directory is None else directory
        if job.config.launcher.local_ranks > 1 and job.config.run is None:
            return self._as_job(job, directory).outcome()
        with command_line(self.command):  # what the person typed goes into the record of the run
            if directory is not None and _is_begun(job, directory):
                return begin_or_go_on(job.config, str(directory), job.saved)
            outcome = run(job.config, run_dir=directory, saved=job.saved)
        if directory is not None and job.config.run is not None and outcome.run_dir is not None:
            link(directory, outcome.run_dir)  # of a run that is elsewhere, measured again
        return outcome

    def _as_job(self, job: Job, directory: Path | None) -> RunJob:
        return RunJob(
            config=to_dict(job.config),
            run_dir=None if directory is None else str(directory),
            command=self.command,
            saved=None if job.saved is None else to_dict(job.saved),
            ranks=job.config.launcher.local_ranks,
        )


def _is_begun(job: Job, directory: Path) -> bool:
    return job.config.resume is not None or (directory / CONFIG).exists()


def guarded(work: Callable[[], Outcome]) -> Done:
    """Do the work; say what went wrong, with a traceback only where nobody foresaw it."""
    try:
        return Done(ExitCode.ok, _objective(work()))
    except ConfigError as error:
        _log.error("%s", invalid(error))
        return Done(ExitCode.bad_config, math.nan, str(error))
    except (RunError, RunDirectoryError, CheckpointError, WeightsError) as error:
        _log.error("The run failed: %s", error)
        reason = str(error)
    except SystemExit as error:
        reason = f"ended itself with exit code {error.code}"
        _log.error("The run %s.", reason)
    except Exception as error:
        text = of_the_disk(error)
        if text is not None:
            _log.error("The run failed: %s", text)
        else:
            _log.exception("The run failed with an error that should not happen:")
        reason = text or f"{type(error).__name__}: {error}"
    return Done(ExitCode.run_failed, math.nan, reason)


def of_the_disk(error: BaseException, place: Path | None = None) -> str | None:
    """What a person is told of an error that is the disk's: full, read-only, closed; None for all others.

    Args:
        error: what was raised.
        place: what was written to, for an error that names no file.
    """
    if not isinstance(error, OSError) or error.errno not in _OF_THE_DISK:
        return None
    path = error.filename or place
    return str(cannot("write", Path(path), error)) if path else f"cannot write: {error.strerror}"


def _objective(outcome: Outcome) -> float:
    value = outcome.summary.get("objective")
    return math.nan if value is None else float(value)
