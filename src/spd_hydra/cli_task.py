"""What happens in one job: the run, and its errors in words and exit codes."""

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from spd_hydra.checkpoint import CheckpointError
from spd_hydra.composer import Composer, to_run_config
from spd_hydra.composition import Job, compose_job
from spd_hydra.config import to_dict
from spd_hydra.config_errors import invalid
from spd_hydra.environment import command_line
from spd_hydra.exit_code import ExitCode
from spd_hydra.launcher.job import RunJob, begin_or_go_on
from spd_hydra.launcher.record import hide_secrets
from spd_hydra.model.weights import WeightsError
from spd_hydra.plan import Plan
from spd_hydra.preflight import preflight
from spd_hydra.report.sweep import SweepRow
from spd_hydra.result import Outcome
from spd_hydra.run import RunError, run
from spd_hydra.run_dir import RunDirectoryError
from spd_hydra.section import ConfigError
from spd_hydra.stop import Stopped

_log = logging.getLogger(__name__)


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
            self.codes[0], value = guarded(lambda: self._run(job, None))
            return value
        hide_secrets(Path(hydra.sweep.dir))
        overrides = [str(text) for text in OmegaConf.to_container(hydra.overrides.task) or []]
        directory = Path(hydra.runtime.output_dir)
        if not hydra.launcher._target_.endswith(".BasicLauncher"):
            return _objective(self._as_job(self._swept(cfg, overrides), directory).outcome())
        return self._next(int(hydra.job.num), overrides, directory)

    def _next(self, number: int, overrides: list[str], directory: Path) -> float:
        """Run one job of a sweep in this process.

        Raises:
            Stopped: the run is whole, but a signal that came too late for it asked for no more.
        """
        late: list[Stopped] = []

        def work() -> Outcome:
            job = self.planned(overrides)
            if self._on_start is not None:
                self._on_start(number, job)
            outcome = self._run(job, directory)
            late.extend([outcome.late_stop] if outcome.late_stop is not None else [])
            return outcome

        self.codes[number], value = guarded(work)
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
        if job.config.launcher.local_ranks > 1 and job.config.run is None:
            return self._as_job(job, directory).outcome()
        with command_line(self.command):  # what the person typed goes into the record of the run
            if directory is not None and job.saved is not None:
                return begin_or_go_on(job.config, str(directory), job.saved)
            return run(job.config, run_dir=directory, saved=job.saved)

    def _as_job(self, job: Job, directory: Path | None) -> RunJob:
        return RunJob(
            config=to_dict(job.config),
            run_dir=None if directory is None else str(directory),
            command=self.command,
            saved=None if job.saved is None else to_dict(job.saved),
            ranks=job.config.launcher.local_ranks,
        )


def guarded(work: Callable[[], Outcome]) -> tuple[ExitCode, float]:
    """Do the work; say what went wrong, with a traceback only where nobody foresaw it."""
    try:
        return ExitCode.ok, _objective(work())
    except ConfigError as error:
        _log.error("%s", invalid(error))
        return ExitCode.bad_config, math.nan
    except (RunError, RunDirectoryError, CheckpointError, WeightsError) as error:
        _log.error("The run failed: %s", error)
    except SystemExit as error:
        _log.error("The run ended itself with exit code %s.", error.code)
    except Exception:
        _log.exception("The run failed with an error that should not happen:")
    return ExitCode.run_failed, math.nan


def _objective(outcome: Outcome) -> float:
    value = outcome.summary.get("objective")
    return math.nan if value is None else float(value)
