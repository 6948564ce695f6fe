"""The script that is submitted, and what is read from the cluster's answers."""

import shlex
import sys
from pathlib import Path

import pytest

from spd_hydra.launcher import slurm
from spd_hydra.launcher.slurm import SchedulerState
from spd_hydra.launcher_config import Slurm
from spd_hydra.section import ConfigError

FOLDER = Path("/data/a sweep/.submitit")


def lines(launcher: Slurm, number: int = 1) -> list[str]:
    return slurm.sbatch_script(launcher, "spd-mine", FOLDER, number).splitlines()


def options(launcher: Slurm, number: int = 1) -> dict[str, str | None]:
    """The lines that begin with #SBATCH, by the name of the option."""
    found: dict[str, str | None] = {}
    for line in lines(launcher, number):
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            name, equals, value = word.removeprefix("--").partition("=")
            assert name not in found, "named twice"
            found[name] = value if equals else None
    return found


ALWAYS = {
    "error": "/data/a sweep/.submitit/%j_0_log.err",
    "output": "/data/a sweep/.submitit/%j_0_log.out",
    "job-name": "spd-mine",
    "nodes": "1",
    "ntasks-per-node": "1",
    "open-mode": "append",
    "requeue": None,
    "signal": "USR2@120",
    "time": "1440",
    "wckey": "submitit",
}


def test_what_is_not_asked_for_adds_no_line() -> None:
    assert options(Slurm(gpus=0)) == ALWAYS
    assert not any("# setup" in line for line in lines(Slurm(gpus=0)))


def test_every_field_is_a_line_of_the_script() -> None:
    launcher = Slurm(
        partition="gpu", time="1-12:00:30", memory="32G", gpus=2, nodes=3, cpus=7, account="my lab",
        qos="low", constraint="h100|h200", exclude="node[1-3]", setup=["module load cuda", "ulimit -n 4096"],
        array_parallelism=4, signal_seconds=300, additional={"reservation": "mine", "mail_type": "END"},
    )  # fmt: skip
    assert options(launcher, number=9) == {
        "account": "my lab",
        "array": "0-8%4",
        "constraint": "h100|h200",
        "cpus-per-task": "7",
        "error": "/data/a sweep/.submitit/%A_%a_0_log.err",
        "exclude": "node[1-3]",
        "gpus-per-node": "2",
        "job-name": "spd-mine",
        "mail-type": "END",
        "mem": "32G",
        "nodes": "3",
        "ntasks-per-node": "2",
        "open-mode": "append",
        "output": "/data/a sweep/.submitit/%A_%a_0_log.out",
        "partition": "gpu",
        "qos": "low",
        "requeue": None,
        "reservation": "mine",
        "signal": "USR2@300",
        "time": "2161",
        "wckey": "submitit",
    }
    script = lines(launcher, number=9)
    place = script.index("# setup")
    assert script[place + 1 : place + 3] == ["module load cuda", "ulimit -n 4096"]
    (command,) = [shlex.split(line) for line in script if line.startswith("srun ")]
    assert place < script.index(next(line for line in script if line.startswith("srun ")))
    assert command[:2] == ["srun", "--unbuffered"]
    assert {"--kill-on-bad-exit=1", "--cpus-per-task=7"} <= set(command)
    assert command[-5:] == [sys.executable, "-u", "-m", "submitit.core._submit", str(FOLDER)]


def test_one_job_is_no_array_and_few_jobs_need_no_higher_limit_than_their_number() -> None:
    assert "array" not in options(Slurm(), number=1)
    assert options(Slurm(), number=2)["array"] == "0-1%2"


def test_ranks_without_gpus_are_tasks() -> None:
    found = options(Slurm(gpus=0, ranks_per_node=3))
    assert found["ntasks-per-node"] == "3"
    assert "gpus-per-node" not in found


def test_an_additional_option_may_be_a_flag_and_false_or_null_leave_it_out() -> None:
    given = {"hold": True, "exclusive": False, "comment": None, "nice": 0, "requeue": False}
    found = options(Slurm(gpus=0, additional=given))
    assert found == {key: value for key, value in ALWAYS.items() if key != "requeue"} | {
        "hold": None,
        "nice": "0",
    }


def test_jobs_are_cancelled_by_the_ids_of_their_arrays() -> None:
    assert slurm.cancel_command(["7_0", "7_1", "9", "7_2"]) == "scancel 7 9"


def test_without_sbatch_nothing_can_be_submitted_or_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert slurm.would_accept("#!/bin/bash\n") is None
    assert slurm.states(["1"]) is None
    with pytest.raises(ConfigError) as caught:
        slurm.submit([], Slurm(), "spd-mine", FOLDER)
    assert str(caught.value) == (
        "launcher=slurm: found no sbatch or srun or squeue here; call spd-run where jobs are submitted, look "
        "at the script with launcher.dry_run=true, or use launcher=local_parallel"
    )


def command(folder: Path, name: str, script: str) -> None:
    """A stand-in; what SLURM really says is tested on a real one."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_what_the_queue_has_forgotten_is_looked_up_in_the_accounts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    command(tmp_path, "squeue", "echo '5_0   RUNNING  0'; echo '5_2  CANCELLED 15'")
    command(tmp_path, "sacct", "echo '5_1|CANCELLED by 1000|0:15'")
    assert slurm.states(["5_0", "5_1", "5_2"]) == {
        "5_0": SchedulerState(name="RUNNING", exit_code="0:0"),
        "5_1": SchedulerState(name="CANCELLED", exit_code="0:15"),
        "5_2": SchedulerState(name="CANCELLED", exit_code="0:15"),
    }
    command(tmp_path, "sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert set(slurm.states(["5_0", "5_1", "5_2"]) or {}) == {"5_0", "5_2"}
    command(tmp_path, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert slurm.states(["5_0"]) == {}
    command(tmp_path, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    assert slurm.states(["5_0"]) is None


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("PartitionTimeLimit", "PartitionTimeLimit"),
        ("ReqNodeNotAvail, Reserved for maintenance", "ReqNodeNotAvail, Reserved for maintenance"),
        ("Priority", ""),
        ("Resources", ""),
        ("None", ""),
        ("", ""),
    ],
)
def test_what_a_job_waits_for_is_told_unless_it_is_its_turn(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, reason: str
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    command(tmp_path, "squeue", f"echo '5   PENDING  0    {said}   '")
    assert slurm.states(["5"]) == {"5": SchedulerState(name="PENDING", exit_code="0:0", reason=reason)}


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "sbatch: error: invalid partition specified: nosuch\n"
            "sbatch: error: Batch job submission failed: Invalid partition name specified",
            "invalid partition specified: nosuch; "
            "Batch job submission failed: Invalid partition name specified",
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid job array specification",
            "Batch job submission failed: Invalid job array specification; an array may be too long for this "
            "cluster, see MaxArraySize in `scontrol show config`: sweep over fewer jobs at once",
        ),
        ("", "no reason given"),
    ],
)
def test_all_that_sbatch_says_of_a_refusal_is_told(said: str, told: str) -> None:
    assert slurm._of_sbatch(said) == told


@pytest.mark.parametrize(
    ("said", "exit_code"), [("256", "1:0"), ("35072", "137:0"), ("9", "0:9"), ("137:0", "137:0"), ("", "")]
)
def test_how_a_job_ended_is_written_as_the_accounts_write_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, said: str, exit_code: str
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    command(tmp_path, "squeue", f"echo '5  FAILED  {said}'")
    assert slurm.states(["5"]) == {"5": SchedulerState(name="FAILED", exit_code=exit_code)}


def test_a_command_of_slurm_that_does_not_answer_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "_SECONDS", 0.3)
    for name in ("squeue", "sacct", "sbatch"):
        command(tmp_path, name, "exec sleep 30")
    assert slurm.states(["1"]) is None
    assert slurm.would_accept("#!/bin/bash\n") == "not checked: sbatch does not answer"
