"""What runs in a process of its own: one run, exactly as it was composed when it was submitted."""

import contextlib
import dataclasses
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from spd_hydra import atomic, distributed
from spd_hydra.components import load_plugins
from spd_hydra.config import RunConfig
from spd_hydra.dotenv import load_dotenv
from spd_hydra.environment import code_digest, command_line
from spd_hydra.exit_code import ExitCode
from spd_hydra.launcher.local_ranks import free_port, local_ranks
from spd_hydra.launcher.record import launcher_in
from spd_hydra.result import Outcome
from spd_hydra.run import RunError, run
from spd_hydra.saved_config import from_dict, load_config
from spd_hydra.section import ConfigError
from spd_hydra.sources import from_sources, is_commit, sources, with_whole_paths
from spd_hydra.stop import Stopped

logger = logging.getLogger(__name__)

_MEETING_SECONDS = 600.0  # for all nodes of a job to begin
_POLL_SECONDS = 0.1
_ASK_SECONDS = 1.0  # between two signals to a process that is to end


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunJob:
    """One run as plain data, so that YAML files may change while it waits in a queue.

    Called in the process that is to do it. Called again, after a requeue, it goes on where its run directory
    ends; a run that has finished does nothing.

    Attributes:
        config: the composed configuration, as `to_dict` gives it.
        run_dir: where the run writes; None: a new folder below `out_dir`.
        command: the command line that was typed, for the record.
        saved: for `resume=`, the configuration as it was saved.
        code: digest of the sources when the job was submitted; None: not recorded.
        ranks: processes to share the run on this machine; 1 also where the scheduler starts them.
        starter: the process on this machine without which the job saves and ends; None: it needs nobody.
        gpus: what `CUDA_VISIBLE_DEVICES` names for it; None: as it is.
    """

    config: dict[str, Any]
    run_dir: str | None
    command: list[str]
    saved: dict[str, Any] | None = None
    code: str | None = None
    ranks: int = 1
    starter: int | None = None
    gpus: str | None = None

    def __call__(self) -> dict[str, Any]:
        """Do the run, or go on with it, and return its summary.

        Raises:
            SystemExit: a signal stopped it; it saved.
        """
        if self.starter is not None:
            ends_with(self.starter)
        if self.gpus is not None:  # before torch looks for them
            os.environ["CUDA_VISIBLE_DEVICES"] = self.gpus
        try:
            return self.outcome().summary
        except Stopped as stopped:
            sys.exit(stopped.exit_code)

    def outcome(self) -> Outcome:
        """Do the run, or go on with it."""
        logging.basicConfig(format="%(message)s", level=logging.INFO)
        load_dotenv()
        load_plugins()
        if self.code is not None and self.code != code_digest():
            logger.warning(
                "The code of spd_hydra has changed since this job was submitted: its configuration is the "
                "submitted one, the code that of now (compare environment.json here and of the sweep)."
            )
        saved = None if self.saved is None else from_dict(self.saved)
        with command_line(self.command):
            _export_ranks()
            _use_given_cpus()
            _warn_of_idle_gpus(self.config["device"])
            with self._further_ranks():
                config = from_dict(self.config)
                if self.run_dir is not None:
                    with contextlib.suppress(ConfigError):  # it is for what is said of how to go on
                        config = dataclasses.replace(config, launcher=launcher_in(Path(self.run_dir).parent))
                return begin_or_go_on(config, self.run_dir, saved)

    def _further_ranks(self) -> AbstractContextManager[None]:
        if self.ranks == 1:
            return nullcontext()
        further = dataclasses.replace(self, ranks=1, starter=None)  # they end with this process
        return local_ranks(self.ranks, [sys.executable, "-m", "spd_hydra.launcher.job"], further.to_json())

    def checkpoint(self) -> Any:
        """What submitit puts back into the queue: the same again, since the run directory knows the rest."""
        from submitit.helpers import DelayedSubmission  # noqa: PLC0415

        return DelayedSubmission(self)

    def to_json(self) -> bytes:
        """As bytes for the standard input of another process."""
        return json.dumps(dataclasses.asdict(self)).encode()

    @classmethod
    def from_json(cls, data: bytes) -> "RunJob":
        """What `to_json` gave."""
        return cls(**json.loads(data))


def ends_with(process: int) -> None:
    """From now on this process is asked to save and end, by SIGTERM, as soon as another one has ended.

    Not by prctl, as ranks are: submitit puts a process between the two, which outlives the first. Linux alone
    can wait for a process that is no child; elsewhere this one goes on.

    Raises:
        SystemExit: the other one has ended already.
    """
    if not hasattr(os, "pidfd_open"):
        return
    try:
        descriptor = os.pidfd_open(process)
    except ProcessLookupError:
        sys.exit(ExitCode.terminated)
    except OSError:  # an old kernel
        return
    threading.Thread(target=_end_after, args=(descriptor,), daemon=True).start()


def _end_after(descriptor: int) -> None:
    select.select([descriptor], [], [])
    while True:  # before the run listens, submitit passes over SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_ASK_SECONDS)


def begin_or_go_on(config: RunConfig, run_dir: str | None, saved: RunConfig | None) -> Outcome:
    """Begin a run, or go on with the one that its directory holds already: the job was requeued.

    A run that goes on in a directory of its own is linked from where the sweep looks for it.
    """
    if run_dir is not None and config.resume is not None:
        if distributed.leads():
            link(Path(run_dir), Path(config.resume))
        return run(config, saved=saved)
    if run_dir is not None and Path(run_dir, "config.yaml").exists():
        began = load_config(Path(run_dir, "config.yaml"))
        if began.task is not config.task:
            raise ConfigError(
                f"task: got {config.task.name}, but {run_dir} holds a run of task={began.task.name}; choose "
                "another directory"
            )
        return run(dataclasses.replace(_as_it_began(config, began), resume=run_dir, run_dir=None))
    return run(config, run_dir=None if run_dir is None else Path(run_dir), saved=saved)


def _as_it_began(config: RunConfig, began: RunConfig) -> RunConfig:
    """The configuration of a run that was begun, where what was given had to be found out then.

    A branch of a hub is then a commit, and a run to start from one of its checkpoints. Anything else that
    was given stays, to be refused if it is other than what the run began with.
    """
    config = with_whole_paths(config)
    then, now = sources(began), sources(config)
    commits = {
        part: {
            field: value
            for field, value in own.items()
            if field.endswith("revision") and not is_commit(now[part].get(field))
        }
        for part, own in then.items()
        if type(getattr(began, part)) is type(getattr(config, part))
    }
    if config.start_from is not None and began.start_from is not None:
        given, checkpoint = Path(config.start_from).expanduser().absolute(), Path(began.start_from)
        if given in {checkpoint, checkpoint.parent.parent}:
            config = dataclasses.replace(config, start_from=began.start_from)
    return from_sources(config, commits)


def link(place: Path, run_dir: Path) -> None:
    """Make the directory of a run elsewhere found where a sweep looks for that of its job."""
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.is_symlink():
        with contextlib.suppress(OSError):  # of Hydra, and empty, if it is there
            place.rmdir()
    with contextlib.suppress(FileExistsError):  # of an earlier start of this job
        place.symlink_to(run_dir.absolute(), target_is_directory=True)


def _export_ranks() -> None:
    """Say in torchrun's variables which of the job's processes this is, if it has several."""
    if "SUBMITIT_EXECUTOR" not in os.environ:
        return
    from submitit import JobEnvironment  # noqa: PLC0415
    from submitit.helpers import TorchDistributedEnvironment  # noqa: PLC0415

    job = JobEnvironment()
    if job.num_tasks > 1:
        os.environ["MASTER_PORT"] = _port_of_rank_0(job)
        # By default it would also overwrite CUDA_VISIBLE_DEVICES, which SLURM has set to the job's own GPUs.
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def _port_of_rank_0(job: Any) -> str:
    """Where the ranks meet: a port that is free on rank 0's machine, told in a file of this start of the job.

    submitit's own choice follows from the job's id, and may be taken by another job on that machine.
    """
    start = os.environ.get("SLURM_RESTART_COUNT", "0")
    path = Path(job.paths.folder) / f"{job.job_id}_{start}_port"
    if job.global_rank == 0:
        atomic.replace(path, str(free_port()))
    deadline = time.monotonic() + _MEETING_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            raise RunError(f"rank 0 did not say within {_MEETING_SECONDS:g} s where the ranks meet ({path})")
        time.sleep(_POLL_SECONDS)
    return path.read_text()


def _use_given_cpus() -> None:
    """As many threads as SLURM gave CPUs to this process, which the machine's own count does not tell."""
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    if given is not None:
        torch.set_num_threads(int(given))


def _warn_of_idle_gpus(device: str) -> None:
    """A cluster charges for GPUs also where torch was installed without CUDA."""
    if device == "auto" and os.environ.get("SLURM_JOB_GPUS") and not torch.cuda.is_available():
        logger.warning(
            "SLURM gave this job GPUs, but torch sees none: computing on the CPU. Install a torch with CUDA, "
            "make sure of it with device=cuda, or ask for no GPUs with launcher.gpus=0."
        )


def main() -> int:
    """Do the job that comes as JSON from standard input: a further rank of a run on this machine."""
    try:
        RunJob.from_json(sys.stdin.buffer.read())()
    except RunError:  # rank 0 tells
        return ExitCode.run_failed
    return ExitCode.ok


if __name__ == "__main__":
    sys.exit(main())
