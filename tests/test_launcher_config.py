"""What may be asked of a launcher, and what is said of the rest."""

import re
from typing import Any

import pytest

from spd_hydra.launcher_config import Launcher, LocalParallel, Slurm
from spd_hydra.section import ConfigError


def message(kind: type[Launcher], **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        kind(**options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("time", "minutes"),
    [
        ("5", 5),
        ("90", 90),
        ("5:30", 6),  # minutes and seconds, not hours and minutes
        ("5:00", 5),
        ("1:00:00", 60),
        ("1:00:01", 61),
        ("12:00:00", 720),
        ("100:00:00", 6000),
        ("2-12", 3600),
        ("2-12:30", 3630),
        ("2-12:30:20", 3631),
        ("1-0", 1440),
        ("0-00:05:00", 5),
    ],
)
def test_a_time_is_read_as_sbatch_reads_it_and_rounded_up_to_minutes(time: str, minutes: int) -> None:
    assert Slurm(time=time).minutes == minutes


@pytest.mark.parametrize(
    "time", ["0", "0:00", "0-0", "x", "", "5m", "-5", "1:2:3:4", "1-2:3:4:5", "1-", "2 h", "1.5", "UNLIMITED"]
)
def test_what_is_no_time_is_refused(time: str) -> None:
    wanted = f"time: got {time}, must be minutes, mm:ss, hh:mm:ss, d-hh or d-hh:mm:ss, above 0"
    assert message(Slurm, time=time) == wanted


@pytest.mark.parametrize("time", ["2", "2:00", "1:59", "0:02:00"])
def test_a_time_that_ends_before_the_job_would_save_is_refused(time: str) -> None:
    assert message(Slurm, time=time) == (
        f"time: got {time}, which leaves nothing before the job saves, launcher.signal_seconds=120 earlier; "
        "ask for more time or set that lower"
    )
    assert Slurm(time=time, signal_seconds=10).signal_seconds == 10


@pytest.mark.parametrize(("time", "meant"), [("3600", "2-12:00"), ("43200", "30-00:00"), ("3661", "2-13:01")])
def test_many_minutes_are_taken_for_a_time_that_yaml_made_a_number(time: str, meant: str) -> None:
    assert message(Slurm, time=time) == (
        f"time: got {time}, many minutes for sbatch; write {meant} if that is meant, and in a YAML file put "
        'quotes around a time: "12:00:00", since YAML makes it 43200'
    )
    assert Slurm(time=meant).minutes == int(time)


def test_an_hour_less_a_second_in_yaml_is_too_short_to_be_told_from_minutes() -> None:
    assert Slurm(time="3599").minutes == 3599


def test_a_second_more_than_it_takes_to_save_is_enough() -> None:
    assert Slurm(time="2:01").minutes == 3


@pytest.mark.parametrize("memory", ["512", "512M", "32G", "1T", "900K", "0", None])
def test_memory_is_a_number_with_a_unit(memory: str | None) -> None:
    assert Slurm(memory=memory).memory == memory


@pytest.mark.parametrize("memory", ["32GB", "32g", "1.5G", "G", "", "32 G", "-1G"])
def test_what_is_no_memory_is_refused(memory: str) -> None:
    assert message(Slurm, memory=memory) == (
        f"memory: got {memory}, must be a number with K, M, G or T, e.g. 32G"
    )


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("partition", "partition"),
        ("time", "time"),
        ("mem", "memory"),
        ("gpus-per-node", "gpus"),
        ("gpus_per_node", "gpus"),
        ("nodes", "nodes"),
        ("ntasks_per_node", "ranks_per_node"),
        ("ntasks-per-node", "ranks_per_node"),
        ("cpus-per-task", "cpus"),
        ("account", "account"),
        ("qos", "qos"),
        ("constraint", "constraint"),
        ("exclude", "exclude"),
        ("signal", "signal_seconds"),
        ("array", "array_parallelism"),
    ],
)
def test_an_additional_option_that_has_its_own_key_is_refused_with_that_key(name: str, key: str) -> None:
    assert message(Slurm, additional={name: "x"}) == (
        f"additional.{name}: has a key of its own: launcher.{key}"
    )


@pytest.mark.parametrize("name", ["output", "error", "open-mode", "open_mode", "ntasks"])
def test_an_additional_option_that_would_break_the_job_is_refused(name: str) -> None:
    found = message(Slurm, additional={name: "x"})
    assert re.fullmatch(rf"additional\.{name}: is set by spd-run[^;]*; leave it out", found)


def test_other_additional_options_are_taken() -> None:
    given = {"reservation": "mine", "mail-type": "END", "gres": "shard:1", "hold": True}
    assert Slurm(additional=dict(given)).additional == given


@pytest.mark.parametrize(
    ("gpus", "given", "ranks"), [(0, None, 1), (1, None, 1), (4, None, 4), (4, 4, 4), (0, 3, 3)]
)
def test_a_node_has_one_rank_for_each_gpu_and_at_least_one(gpus: int, given: int | None, ranks: int) -> None:
    assert Launcher(gpus=gpus, ranks_per_node=given).local_ranks == ranks
    assert Slurm(gpus=gpus, ranks_per_node=given, nodes=3).ranks == 3 * ranks


@pytest.mark.parametrize("kind", [Launcher, LocalParallel, Slurm])
def test_another_number_of_ranks_than_gpus_is_refused(kind: type[Launcher]) -> None:
    wanted = "ranks_per_node: got 2 for 4 GPUs; every GPU has one rank, so leave it out"
    assert message(kind, gpus=4, ranks_per_node=2) == wanted


def test_jobs_on_this_machine_are_always_waited_for() -> None:
    assert message(LocalParallel, wait=False) == (
        "wait: got false, but jobs on this machine end with spd-run: leave it out"
    )


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"gpus": -1}, "gpus: got -1, must be ≥ 0"),
        ({"nodes": 0}, "nodes: got 0, must be ≥ 1"),
        ({"cpus": 0}, "cpus: got 0, must be ≥ 1"),
        ({"array_parallelism": 0}, "array_parallelism: got 0, must be ≥ 1"),
        ({"max_requeues": -1}, "max_requeues: got -1, must be ≥ 0"),
        ({"signal_seconds": 9}, "signal_seconds: got 9, must be ≥ 10"),
        ({"poll_seconds": 0.0}, "poll_seconds: got 0.0, must be > 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], wanted: str) -> None:
    assert message(Slurm, **options) == wanted
