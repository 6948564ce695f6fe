"""SLURM: the script that is submitted, the submission, and what the cluster says of a job later."""

import dataclasses
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spd_hydra.launcher.job import RunJob
from spd_hydra.launcher_config import Slurm
from spd_hydra.section import ConfigError

REFUSED = "REFUSED"
_SECONDS = 30.0  # that a command of SLURM may take
_GONE = "Invalid job id"
_FIELDS = "JobArrayID:40,State:20,exit_code:20,Reason:80"
_NO_REASONS = {"", "None", "Priority", "Resources"}  # of a job that only has to wait its turn


# Deaf to SIGUSR2 until submitit listens, which takes imports of seconds: it would end the job for good.
_PYTHON = f"""sh -c 'trap "" USR2; exec "$0" "$@"' {shlex.quote(sys.executable)}"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerState:
    """What the scheduler says of a job: a state such as `RUNNING`, how it ended, why it has to wait."""

    name: str
    exit_code: str = ""
    reason: str = ""


def sbatch_parameters(launcher: Slurm, name: str) -> dict[str, Any]:
    """What submitit turns into the lines of an sbatch script."""
    given = {
        "partition": launcher.partition,
        "mem": launcher.memory,
        "gpus_per_node": _gpus(launcher),
        "cpus_per_task": launcher.cpus,
        "account": launcher.account,
        "qos": launcher.qos,
        "constraint": launcher.constraint,
        "exclude": launcher.exclude,
        "setup": list(launcher.setup) or None,
    }
    additional = {"requeue": True} | dict(launcher.additional)
    # Since SLURM 22.05 srun no longer takes the number of CPUs from the job that it runs in.
    cpus = [f"--cpus-per-task={launcher.cpus}"] if launcher.cpus else []
    return {key: value for key, value in given.items() if value is not None} | {
        "job_name": name,
        "time": launcher.minutes,
        "nodes": launcher.nodes,
        "ntasks_per_node": launcher.local_ranks,
        "array_parallelism": launcher.array_parallelism,
        "signal_delay_s": launcher.signal_seconds,
        # When one rank dies the others wait for it in vain: end them too.
        "srun_args": ["--kill-on-bad-exit=1", *cpus],
        "additional_parameters": {
            name: value for name, value in additional.items() if value is not None and value is not False
        },
    }


def _gpus(launcher: Slurm) -> str | int | None:
    if not launcher.gpus:
        return None
    return launcher.gpus if launcher.gpu_type is None else f"{launcher.gpu_type}:{launcher.gpus}"


def sbatch_script(launcher: Slurm, name: str, folder: Path, number: int) -> str:
    """The script that `submit` gives to sbatch, to the letter.

    Args:
        launcher: what is asked for.
        name: of the job.
        folder: where submitit keeps scripts and logs.
        number: how many jobs; more than one are an array.
    """
    from submitit.slurm.slurm import _make_sbatch_string  # noqa: PLC0415

    # The executor would do, but is not to be had where there is no SLURM.
    command = f"{_PYTHON} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    parameters = sbatch_parameters(launcher, name) | ({"map_count": number} if number > 1 else {})
    return _make_sbatch_string(command=command, folder=folder, **parameters)


def submit(jobs: Sequence[RunJob], launcher: Slurm, name: str, folder: Path) -> list[str]:
    """Submit jobs, several as one array, and return their ids.

    Raises:
        ConfigError: the cluster does not take them, or this machine has no sbatch.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError  # noqa: PLC0415
    from submitit.slurm.slurm import SlurmExecutor  # noqa: PLC0415

    require_sbatch()
    executor = SlurmExecutor(folder=folder, max_num_timeout=launcher.max_requeues, python=_PYTHON)
    executor.update_parameters(**sbatch_parameters(launcher, name))
    try:
        submitted = executor.submit_array(jobs)
    except (FailedJobError, FailedSubmissionError) as error:
        raise ConfigError(
            f"launcher: the cluster refuses the job: {_of_sbatch(str(error))}; "
            "launcher.dry_run=true shows what is asked for"
        ) from None
    except OSError as error:
        raise ConfigError(f"launcher: nothing can be written to {folder}: {error.strerror}") from error
    return [job.job_id for job in submitted]


def require_sbatch() -> None:
    """Fail if nothing can be submitted from here.

    Raises:
        ConfigError: there is no sbatch.
    """
    missing = [name for name in ("sbatch", "srun", "squeue") if shutil.which(name) is None]
    if missing:
        raise ConfigError(
            f"launcher=slurm: found no {' or '.join(missing)} here; call spd-run where jobs are submitted, "
            "look at the script with launcher.dry_run=true, or use launcher=local_parallel"
        )


def would_accept(script: str) -> str | None:
    """What the cluster says to a script that is not submitted; None: there is no sbatch to ask."""
    if shutil.which("sbatch") is None:
        return None
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        try:
            done = _call("sbatch", "--test-only", file.name)
        except subprocess.TimeoutExpired:
            return "not checked: sbatch does not answer"
    text = _last_line(done.stderr or done.stdout).removeprefix("sbatch: ")
    return f"accepted: {text}" if done.returncode == 0 else f"{REFUSED}: {text}"


def states(ids: Sequence[str]) -> dict[str, SchedulerState] | None:
    """What the cluster knows of these jobs, with or without accounting; None: it does not answer.

    A job that it has forgotten is missing from the answer.
    """
    found = _from_squeue(ids)
    if found is None:
        return None
    rest = [job for job in ids if job not in found]
    return found | _from_sacct(rest) if rest else found


def _from_squeue(ids: Sequence[str]) -> dict[str, SchedulerState] | None:
    arrays = ",".join(dict.fromkeys(job.partition("_")[0] for job in ids))
    try:
        done = _call(
            "squeue", "--noheader", "--array", "--states=all", f"--jobs={arrays}", f"--Format={_FIELDS}"
        )
    except (OSError, subprocess.SubprocessError):
        return None
    if done.returncode:
        return {} if _GONE in done.stderr else None
    found = {}
    for line in done.stdout.splitlines():
        job, state, code, reason = (*line.split(maxsplit=3), "", "", "", "")[:4]
        if job:
            said = "" if reason.strip() in _NO_REASONS else reason.strip()
            found[job] = SchedulerState(name=state, exit_code=_exit_code(code), reason=said)
    return found


def _exit_code(text: str) -> str:
    """As the accounts write it, `code:signal`; squeue gives the status that wait(2) returns: 256 is `1:0`."""
    if not text.isdecimal():
        return text
    status = int(text)
    return f"{status >> 8}:{status & 0x7F}"


def _from_sacct(ids: Sequence[str]) -> dict[str, SchedulerState]:
    try:
        done = _call("sacct", "-X", "-n", "-P", "-o", "JobID,State,ExitCode", "-j", ",".join(ids))
    except (OSError, subprocess.SubprocessError):
        return {}
    rows = [
        line.split("|") for line in done.stdout.splitlines() if line.count("|") == 2
    ]  # other: no accounting
    return {job: SchedulerState(name=state.split()[0], exit_code=code) for job, state, code in rows if state}


def _call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def _of_sbatch(text: str) -> str:
    """All that sbatch says, since the first line often has the reason, and what to do about a limit."""
    lines = [line.strip().removeprefix("sbatch: error: ") for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("sbatch: ")] or [_last_line(text)]
    if any("array specification" in line for line in said):
        said.append(
            "an array may be too long for this cluster, see MaxArraySize in `scontrol show config`: sweep "
            "over fewer jobs at once"
        )
    return "; ".join(dict.fromkeys(said))


def cancel_command(ids: Mapping[int, str] | Sequence[str]) -> str:
    """The line that cancels these jobs."""
    values = ids.values() if isinstance(ids, Mapping) else ids
    return "scancel " + " ".join(dict.fromkeys(job.partition("_")[0] for job in values))
