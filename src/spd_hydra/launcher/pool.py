"""Jobs side by side on this machine, through submitit's local executor, at most so many at once.

They end with this process, however that ends.
"""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from spd_hydra.launcher.job import RunJob
from spd_hydra.launcher.slurm import SchedulerState
from spd_hydra.launcher_config import LocalParallel

_MINUTES = 60 * 24 * 365  # submitit wants a limit


class Pool:
    """Starts jobs as others end.

    Args:
        jobs: by number.
        launcher: how many at once, and on what.
        folder: where submitit keeps pickles and logs.
    """

    def __init__(self, jobs: dict[int, RunJob], launcher: LocalParallel, folder: Path) -> None:
        from submitit.local.local import LocalExecutor  # noqa: PLC0415

        self._waiting = dict(jobs)
        self._launcher = launcher
        self._executor = LocalExecutor(folder=folder, max_num_timeout=0)
        self._slots: dict[int, int | None] = dict.fromkeys(range(launcher.jobs))  # slot: number of its job
        self._started: dict[int, Any] = {}
        self._refused: dict[int, SchedulerState] = {}
        self._is_stopping = False

    def states(self) -> dict[int, SchedulerState]:
        """Start what there is room for, and say of every job how it stands."""
        for slot, number in self._slots.items():
            if number is None or not self._is_running(number):
                self._slots[slot] = None
                if self._waiting:
                    self._start(slot, min(self._waiting))
        if self._is_stopping:
            self._ask_to_end()  # before its run listens, a job passes over the signal
        found = {number: SchedulerState(name="PENDING") for number in self._waiting} | self._refused
        for number in self._started:
            # submitit's process between them hides how the job ended; its status file tells.
            found[number] = SchedulerState(name="RUNNING" if self._is_running(number) else "COMPLETED")
        return found

    def ids(self) -> dict[int, str]:
        """Ids of the jobs that have been started."""
        return {number: job.job_id for number, job in self._started.items()}

    def stop(self) -> None:
        """Ask running jobs to save and end, and start no more."""
        self._waiting, self._is_stopping = {}, True
        self._ask_to_end()

    def _ask_to_end(self) -> None:
        for number, job in self._started.items():
            if self._is_running(number):
                job._process.send_signal(signal.SIGTERM)

    def _start(self, slot: int, number: int) -> None:
        launcher, job = self._launcher, self._waiting.pop(number)
        gpus = _gpus_of(slot, launcher.gpus)
        # submitit knows GPUs by number alone; what they are called here the job is told itself.
        self._executor.update_parameters(
            timeout_min=_MINUTES, gpus_per_node=len(gpus), visible_gpus=tuple(range(len(gpus)))
        )
        job = dataclasses.replace(job, starter=os.getpid(), gpus=",".join(gpus))
        try:
            with _without_ctrl_c():
                self._started[number] = self._executor.submit(job)
        except OSError as error:  # a full disk
            self._refused[number] = SchedulerState(name=f"cannot be started: {error.strerror or error}")
            return
        self._slots[slot] = number

    def _is_running(self, number: int) -> bool:
        return self._started[number]._process.poll() is None


def _gpus_of(slot: int, each: int) -> Sequence[str]:
    """The GPUs of a slot, as `CUDA_VISIBLE_DEVICES` names them: its own as long as there are enough."""
    if not each or not torch.cuda.is_available():
        return [str(index) for index in range(each)]
    there = torch.cuda.device_count()
    given = os.environ.get("CUDA_VISIBLE_DEVICES")  # which may name them otherwise than by number
    names = [str(index) for index in range(there)] if given is None else given.split(",")[:there]
    return [names[(slot * each + index) % there].strip() for index in range(each)]


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Processes that are started within the block never get Ctrl-C, which a terminal sends to all of them.

    They inherit the mask, and `stop` asks them instead: a run that heard both, or a second Ctrl-C, would end
    without saving, and submitit's process between them at once.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
