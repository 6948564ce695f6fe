"""Where jobs run: in this process, side by side on this machine, or on a SLURM cluster."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

from spd_hydra.section import Problem, Section, kind_of, option, register

_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<fields>\d+(?::\d+){0,2})")
_MEMORY = re.compile(r"\d+[KMGT]?")
_HOUR_OF_YAML = 3600  # what YAML makes of 1:00:00: as minutes 60 times what was meant


@register("launcher", "local")
@dataclasses.dataclass(kw_only=True)
class Launcher(Section):
    """In this process, one job after another."""

    gpus: int = option(0, "GPUs of a job on each node, one process (rank) for each", ge=0)
    ranks_per_node: int | None = option(
        None, "processes of a job on each node that share its batches; null: one per GPU, at least one", ge=1
    )

    @property
    def kind(self) -> str:
        """The name by which it is chosen."""
        return str(kind_of(type(self))).rpartition("/")[2]

    @property
    def local_ranks(self) -> int:
        """Processes of a job on one node."""
        return self.ranks_per_node or max(1, self.gpus)

    @property
    def ranks(self) -> int:
        """Processes of a job on all its nodes."""
        return self.local_ranks

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if self.gpus and self.ranks_per_node and self.ranks_per_node != self.gpus:
            yield Problem(
                "ranks_per_node",
                f"got {self.ranks_per_node} for {self.gpus} GPUs; every GPU has one rank, so leave it out",
            )


@dataclasses.dataclass(kw_only=True)
class Background(Launcher):
    """In processes of their own, which are watched or left alone."""

    wait: bool = option(True, "watch the jobs until the last one has ended; false: return at once")
    poll_seconds: float = option(2.0, "seconds between two looks at the jobs", gt=0)


@register("launcher", "local_parallel")
@dataclasses.dataclass(kw_only=True)
class LocalParallel(Background):
    """On this machine, a number of jobs at once, each a process of its own."""

    gpus: int = option(
        0, "GPUs of a job, one process (rank) for each; 0: CPU, also where there is a GPU", ge=0
    )
    jobs: int = option(2, "jobs that run at once; with GPUs, each has its own", ge=1)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not self.wait:
            yield Problem("wait", "got false, but jobs on this machine end with spd-run: leave it out")


@register("launcher", "slurm")
@dataclasses.dataclass(kw_only=True)
class Slurm(Background):
    """Jobs of a SLURM cluster, submitted as one array."""

    partition: str | None = option(
        None, "partition; default $SLURM_PARTITION, else the cluster's own default"
    )
    time: str = option(
        "24:00:00",
        "time limit of a job, as sbatch takes it: minutes, [d-]hh:mm:ss, d-hh; in a YAML file within quotes",
    )
    memory: str | None = option(None, "memory on each node, e.g. 32G; null: the cluster's default")
    gpus: int = option(1, "GPUs of a job on each node, one process (rank) for each; 0: CPU", ge=0)
    gpu_type: str | None = option(
        None, "type of these GPUs, e.g. a100, as the cluster calls it; null: whatever is free"
    )
    nodes: int = option(1, "nodes of a job", ge=1)
    cpus: int | None = option(None, "CPUs of each rank; null: the cluster's default", ge=1)
    account: str | None = option(None, "account that is charged")
    qos: str | None = option(None, "quality of service")
    constraint: str | None = option(None, "features that nodes must have, e.g. h100")
    exclude: str | None = option(
        None, "nodes not to use, e.g. node3; 'launcher.exclude=\"node[1-3]\"' with both pairs of quotes"
    )
    setup: list[str] = option(
        default_factory=list,
        help='shell lines before the job, e.g. [module load cuda]; with = or ~ in quotes: ["A=1"]',
    )
    array_parallelism: int = option(256, "jobs of a sweep that may run at once", ge=1)
    max_requeues: int = option(
        10, "how often a job that reached its time limit goes back into the queue", ge=0
    )
    signal_seconds: int = option(120, "how long before the time limit a job saves and goes back", ge=10)
    additional: dict[str, Any] = option(
        default_factory=dict, help="other options of sbatch by their long names, e.g. {reservation: mine}"
    )
    dry_run: bool = option(False, "show the sbatch script and the jobs, submit nothing")

    @property
    def ranks(self) -> int:
        """Processes of a job on all its nodes."""
        return self.nodes * self.local_ranks

    @property
    def minutes(self) -> int:
        """The time limit in minutes, rounded up."""
        return -(-_seconds(self.time) // 60)

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        if not _TIME.fullmatch(self.time) or _seconds(self.time) == 0:
            yield Problem(
                "time", f"got {self.time}, must be minutes, mm:ss, hh:mm:ss, d-hh or d-hh:mm:ss, above 0"
            )
        elif self.time.isdecimal() and int(self.time) >= _HOUR_OF_YAML:
            days, minutes = divmod(int(self.time), 1440)
            meant = f"{days}-{minutes // 60:02}:{minutes % 60:02}"
            yield Problem(
                "time",
                f"got {self.time}, many minutes for sbatch; write {meant} if that is meant, "
                'and in a YAML file put quotes around a time: "12:00:00", since YAML makes it 43200',
            )
        elif _seconds(self.time) <= self.signal_seconds:
            yield Problem(
                "time",
                f"got {self.time}, which leaves nothing before the job saves, launcher.signal_seconds="
                f"{self.signal_seconds} earlier; ask for more time or set that lower",
            )
        if self.gpu_type is not None and not self.gpus:
            yield Problem("gpu_type", f"got {self.gpu_type} with launcher.gpus=0: leave one out")
        if self.memory is not None and not _MEMORY.fullmatch(self.memory):
            yield Problem("memory", f"got {self.memory}, must be a number with K, M, G or T, e.g. 32G")
        for name, value in self.additional.items():
            option_name = str(name).replace("_", "-")
            if option_name == "gres" and self.gpus and str(value).startswith("gpu"):
                yield Problem(
                    f"additional.{name}",
                    "stands beside launcher.gpus, which asks for GPUs already, of a type with "
                    "launcher.gpu_type=; with launcher.gpus=0 nothing but this is asked for",
                )
            if option_name in _OWN_KEYS:
                yield Problem(f"additional.{name}", f"has a key of its own: {_OWN_KEYS[option_name]}")
            elif option_name in _SET_HERE:
                yield Problem(
                    f"additional.{name}", f"is set by spd-run, {_SET_HERE[option_name]}; leave it out"
                )


_OWN_KEYS = {
    "partition": "launcher.partition",
    "time": "launcher.time",
    "mem": "launcher.memory",
    "gpus-per-node": "launcher.gpus",
    "gpus": "launcher.gpus",
    "gpus-per-task": "launcher.gpus",
    "nodes": "launcher.nodes",
    "ntasks-per-node": "launcher.ranks_per_node",
    "cpus-per-task": "launcher.cpus",
    "account": "launcher.account",
    "qos": "launcher.qos",
    "constraint": "launcher.constraint",
    "exclude": "launcher.exclude",
    "signal": "launcher.signal_seconds",
    "array": "launcher.array_parallelism",
}

_SET_HERE = {
    "output": "which reads the logs of a job where it put them",
    "error": "which reads the logs of a job where it put them",
    "open-mode": "so that a requeued job keeps its log",
    "ntasks": "from launcher.nodes and launcher.ranks_per_node",
}


def _seconds(time: str) -> int:
    """Seconds of a time as sbatch reads it: `5`, `5:30`, `1:00:00`, `2-12`, `2-12:30`; 0 if it is none."""
    match = _TIME.fullmatch(time)
    if match is None:
        return 0
    fields = [int(field) for field in match["fields"].split(":")]
    if match["days"] is not None:
        hours, minutes, seconds = (*fields, 0, 0)[:3]
        return int(match["days"]) * 86400 + hours * 3600 + minutes * 60 + seconds
    if len(fields) == 1:
        return fields[0] * 60
    hours, minutes, seconds = (0, *fields)[-3:]
    return hours * 3600 + minutes * 60 + seconds
