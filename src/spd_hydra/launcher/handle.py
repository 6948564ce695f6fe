"""A submitted job, seen from Python."""

import dataclasses
from pathlib import Path

from spd_hydra.launcher import watch
from spd_hydra.launcher.record import SweepRecord
from spd_hydra.report.sweep import SweepRow


class JobFailed(RuntimeError):
    """A job ended and left no result; the message says why, with its traceback if it left one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobHandle:
    """One job of a sweep.

    Attributes:
        sweep_dir: the directory of the sweep that it belongs to.
        number: its number within the sweep.
        job_id: the scheduler's id.
    """

    sweep_dir: Path
    number: int
    job_id: str

    @property
    def run_dir(self) -> Path:
        """The directory of its run; there once the job has begun."""
        return self.sweep_dir / str(self.number)

    def state(self) -> str:
        """How it stands now: pending, requeued, running, stopped, done or failed."""
        return self.row().state

    def wait(self, poll_seconds: float = 2.0) -> SweepRow:
        """Wait until it has ended, and return how.

        Raises:
            JobFailed: it failed.
        """
        record = self._record()
        (row,) = watch.wait(
            self.sweep_dir, lambda: record, lambda: watch.scheduler_states(record), poll_seconds
        )
        if row.state != "done":
            trace = f"\n{row.traceback}" if row.traceback else ""
            raise JobFailed(f"job {self.job_id} {row.state}: {row.reason}{trace}")
        return row

    def row(self) -> SweepRow:
        """All that is known of it now: state, step, loss, verdict, error."""
        record = self._record()
        (row,) = watch.look(self.sweep_dir, record, watch.scheduler_states(record))
        return row

    def _record(self) -> SweepRecord:
        record = SweepRecord.read(self.sweep_dir)
        return dataclasses.replace(record, jobs=[job for job in record.jobs if job.number == self.number])
