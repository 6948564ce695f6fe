"""Hydra finds its plug-ins here; ours is `hydra/launcher=spd_background`, which `spd-run` chooses itself."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import SlurmLauncher

NAME = "spd_background"


class BackgroundLauncher(SlurmLauncher):  # type: ignore[misc]  # the plug-in has no types
    """submitit's launcher for Hydra, that carries composed configurations and tells how every job ended.

    The one it extends pickles Hydra itself and composes on the node, from YAML files that may have changed by
    then; it swallows a job's error, so that the cluster sees a success; and it waits for ever for a job that
    died without a word.
    """

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Start these jobs and, if they are waited for, return what each came to: NaN where it failed.

        Raises:
            SystemExit: they cannot be started; why stands in the task's `failure`.
        """
        # Imported only now: Hydra imports this module in every program of the environment.
        from spd_hydra.launcher.record import hide_secrets  # noqa: PLC0415
        from spd_hydra.launcher.start import run_in_background  # noqa: PLC0415
        from spd_hydra.section import ConfigError  # noqa: PLC0415

        task: Any = self.task_function
        try:
            jobs = {
                initial_job_idx + place: task.planned(list(words))
                for place, words in enumerate(job_overrides)
            }
            require_results(
                str(self.config.hydra.sweeper._target_), next(iter(jobs.values())).config.launcher
            )
            sweep_dir = Path(str(self.config.hydra.sweep.dir))
            hide_secrets(sweep_dir)
            rows = run_in_background(jobs, sweep_dir, task.command)
        except ConfigError as error:
            # Hydra would show it as a traceback, and a sweeper might go on with other values.
            task.failure = error
            raise SystemExit from error
        task.ended += rows or []
        values = {row.job: row.objective for row in rows or []}
        return [
            _told(overrides, values.get(initial_job_idx + place, math.nan))
            for place, overrides in enumerate(job_overrides)
        ]


def require_results(sweeper: str, launcher: Any) -> None:
    """Fail if a sweeper chooses jobs by results that nobody waits for.

    Raises:
        ConfigError: says so.
    """
    from spd_hydra.section import ConfigError  # noqa: PLC0415

    if not launcher.wait and not sweeper.endswith(".BasicSweeper"):
        name = sweeper.rpartition(".")[2]
        raise ConfigError(
            f"launcher.wait: got false, but {name} chooses jobs by the results of earlier ones: leave it out"
        )


def _told(overrides: Sequence[str], value: float) -> JobReturn:
    return JobReturn(overrides=list(overrides), _return_value=value, status=JobStatus.COMPLETED)


ConfigStore.instance().store(
    group="hydra/launcher",
    name=NAME,
    node={"_target_": f"{BackgroundLauncher.__module__}.{BackgroundLauncher.__name__}"},
    provider="spd_hydra",
)
