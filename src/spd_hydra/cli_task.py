"""What happens in one job: the run, and its errors in words and exit codes."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from spd_hydra.checkpoint import CheckpointError
from spd_hydra.cli_hydra import command_line
from spd_hydra.composition import Composer, to_run_config
from spd_hydra.config_errors import invalid
from spd_hydra.exit_code import ExitCode
from spd_hydra.model.weights import WeightsError
from spd_hydra.plan import Job, plan_job
from spd_hydra.result import Outcome
from spd_hydra.run import RunError, run
from spd_hydra.run_dir import RunDirectoryError
from spd_hydra.section import ConfigError

_log = logging.getLogger(__name__)


class Task:
    """The function that Hydra calls for each job.

    Under Hydra's own launcher no exception leaves it, since that would end the sweep; `codes` holds what each
    job came to. Under any other launcher exceptions pass, so that the cluster sees a failed job.

    Args:
        command: the command line as it was typed, for the record.
        job: the job that was planned, for a single run; None for a sweep.
        config_dir: as `--config-dir`.
    """

    def __init__(self, command: Sequence[str], job: Job | None, config_dir: str | None) -> None:
        self.codes: dict[int, ExitCode] = {}
        self._command = list(command)
        self._job = job
        self._config_dir = config_dir

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run one job; the final loss, for those who optimise over runs."""
        hydra = HydraConfig.get()
        if hydra.mode is not RunMode.MULTIRUN:
            assert self._job is not None, "a single run is planned before Hydra starts it"
            job = self._job
            self.codes[0], loss = guarded(lambda: self._run(job, None))
            return loss
        overrides = [str(text) for text in OmegaConf.to_container(hydra.overrides.task) or []]
        directory = Path(hydra.runtime.output_dir)

        def work() -> Outcome:
            return self._run(self._swept(cfg, overrides), directory)

        if not hydra.launcher._target_.endswith(".BasicLauncher"):
            return _loss(work())
        self.codes[int(hydra.job.num)], loss = guarded(work)
        return loss

    def _swept(self, cfg: DictConfig, overrides: list[str]) -> Job:
        if cfg.resume is None:
            return Job(overrides=overrides, config=to_run_config(cfg))
        with Composer.open(self._config_dir) as composer:
            return plan_job(composer, overrides, self._config_dir)

    def _run(self, job: Job, directory: Path | None) -> Outcome:
        with command_line(self._command):  # what the person typed goes into the record of the run
            return run(job.config, run_dir=directory, saved=job.saved)


def guarded(work: Callable[[], Outcome]) -> tuple[ExitCode, float | None]:
    """Do the work; say what went wrong, with a traceback only where nobody foresaw it."""
    try:
        return ExitCode.ok, _loss(work())
    except ConfigError as error:
        _log.error("%s", invalid(error))
        return ExitCode.bad_config, None
    except (RunError, RunDirectoryError, CheckpointError, WeightsError) as error:
        _log.error("The run failed: %s", error)
    except SystemExit as error:
        _log.error("The run ended itself with exit code %s.", error.code)
    except Exception:
        _log.exception("The run failed with an error that should not happen:")
    return ExitCode.run_failed, None


def _loss(outcome: Outcome) -> float | None:
    losses = outcome.summary.get("losses") or {}
    total = losses.get("total")
    return None if total is None else float(total)
