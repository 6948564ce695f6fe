"""Start jobs in processes of their own, and watch them."""

import dataclasses
import logging
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

from spd_hydra import atomic
from spd_hydra.command_word import command_word
from spd_hydra.composition import Job
from spd_hydra.distributed import say
from spd_hydra.environment import code_digest, describe_environment
from spd_hydra.launcher import slurm, watch
from spd_hydra.launcher.job import RunJob
from spd_hydra.launcher.pool import Pool
from spd_hydra.launcher.record import (
    FILE,
    SUBMITIT,
    SweepJob,
    SweepRecord,
    log_paths,
    make,
    submission_folder,
    write_configs,
)
from spd_hydra.launcher.secret_check import require_no_secrets
from spd_hydra.launcher_config import Launcher, LocalParallel, Slurm
from spd_hydra.metrics_log import to_json
from spd_hydra.overrides import without_hydra
from spd_hydra.plan import require_one_launcher
from spd_hydra.redaction import redact_command
from spd_hydra.report.sweep import SweepRow
from spd_hydra.run_dir import RunDirectoryError
from spd_hydra.run_files import STATUS, RunFiles, cannot
from spd_hydra.saved_config import to_dict
from spd_hydra.section import ConfigError
from spd_hydra.stop import kept_from_children

_log = logging.getLogger(__name__)

_ENVIRONMENT = "environment.json"
_OF_HYDRA = "multirun.yaml"
_SHOWN = 8  # jobs with their logs after a submission


def write_down(jobs: Mapping[int, Job], sweep_dir: Path, command: Sequence[str]) -> SweepRecord:
    """Write down, beside jobs of the same sweep, what is known of these before they start.

    Raises:
        RunDirectoryError: the disk is full or read-only.
    """
    launcher = next(iter(jobs.values())).config.launcher
    write_configs(sweep_dir, {number: job.config for number, job in jobs.items()}, launcher)
    record = _beside_others(new_record(launcher, jobs, command, sweep_dir), sweep_dir)
    record.write(sweep_dir)
    return record


def new_record(
    launcher: Launcher, jobs: Mapping[int, Job], command: Sequence[str], sweep_dir: Path
) -> SweepRecord:
    """What is known of jobs before they start; where they began earlier, they are started again now."""
    return SweepRecord(
        launcher=launcher.kind,
        ranks=launcher.ranks,
        command=shlex.join(redact_command(list(command))),
        code=code_digest(),
        jobs=[
            SweepJob(
                number=number,
                overrides=redact_command(_own_words(job)),
                experiment=job.config.name,
                seed=job.config.seed,
                steps=job.config.train.steps,
                said_before=_time_of_status(sweep_dir / str(number)),
            )
            for number, job in jobs.items()
        ],
    )


def _time_of_status(directory: Path) -> str | None:
    """When a run last wrote how it stands; None: it never did."""
    if not (directory / STATUS).exists():
        return None
    return str((RunFiles(directory).read_status() or {}).get("updated"))


def run_jobs(
    jobs: Mapping[int, Job], sweep_dir: Path, record: SweepRecord, command: Sequence[str]
) -> list[RunJob]:
    """What runs in the processes of these jobs: each one's configuration, as plain data.

    Raises:
        ConfigError: a configuration holds a secret, which would be written into files.
    """
    shown = redact_command(list(command))
    found = []
    for number, job in jobs.items():
        require_no_secrets(job.config)
        launcher = job.config.launcher
        found.append(
            RunJob(
                config=to_dict(job.config),
                run_dir=str(sweep_dir / str(number)),
                command=shown,
                saved=None if job.saved is None else to_dict(job.saved),
                code=record.code,
                # On a cluster the scheduler starts all ranks.
                ranks=1 if isinstance(launcher, Slurm) else launcher.local_ranks,
            )
        )
    return found


def submit(jobs: Mapping[int, Job], launcher: Slurm, sweep_dir: Path, command: Sequence[str]) -> SweepRecord:
    """Submit jobs to SLURM, several as one array, and write down under which ids.

    Raises:
        ConfigError: the cluster does not take them; nothing was submitted.
    """
    slurm.require_sbatch()
    require_plain(sweep_dir)
    # Until their ids are written down, Ctrl-C would leave jobs that nobody knows of.
    with kept_from_children():
        return _submit(jobs, launcher, sweep_dir, command)


def require_plain(sweep_dir: Path) -> None:
    """Refuse a place of jobs whose logs SLURM would write elsewhere.

    Raises:
        ConfigError: there is a % in it.
    """
    if "%" in str(sweep_dir):
        raise ConfigError(
            f"out_dir: got {sweep_dir}, must be without %, which SLURM replaces in the names of log files"
        )


def _submit(jobs: Mapping[int, Job], launcher: Slurm, sweep_dir: Path, command: Sequence[str]) -> SweepRecord:
    record = new_record(launcher, jobs, command, sweep_dir)
    work = run_jobs(jobs, sweep_dir, record, command)
    there = {path.name for path in sweep_dir.iterdir()} if sweep_dir.exists() else set()
    make(sweep_dir)
    folder = submission_folder(sweep_dir)
    _describe(sweep_dir)
    try:
        ids = slurm.submit(work, launcher, name_of(jobs), folder)
    except ConfigError:
        _take_away(sweep_dir, there)
        raise
    submitted = [dataclasses.replace(job, id=id) for job, id in zip(record.jobs, ids, strict=True)]
    record = _beside_others(dataclasses.replace(record, jobs=submitted), sweep_dir)
    try:
        write_configs(sweep_dir, {number: job.config for number, job in jobs.items()}, launcher)
        record.write(sweep_dir)
    except RunDirectoryError as error:
        raise RunDirectoryError(
            f"{error}. The jobs were submitted all the same; cancel them with: {slurm.cancel_command(ids)}"
        ) from error
    return record


def run_in_background(
    jobs: Mapping[int, Job],
    sweep_dir: Path,
    command: Sequence[str],
    on_submitted: Callable[[], None] = lambda: None,
) -> list[SweepRow] | None:
    """Start jobs as their launcher says and, unless told not to, watch them to their end; None: they go on.

    Args:
        jobs: by number.
        sweep_dir: the directory of their sweep.
        command: the command line that was typed, for the record.
        on_submitted: called when a cluster has them, and their ids are written down.

    Raises:
        ConfigError: the jobs cannot be started.
        KeyboardInterrupt: the user stopped watching. Jobs of a cluster go on; jobs on this machine saved,
            as they do on SIGTERM.
    """
    require_one_launcher(list(jobs.values()))  # also of jobs that a sweeper chose as it went
    launcher = next(iter(jobs.values())).config.launcher
    if isinstance(launcher, LocalParallel):
        return _run_in_pool(jobs, launcher, sweep_dir, command)
    assert isinstance(launcher, Slurm), "jobs of the other launchers run in this process"
    with kept_from_children():  # so that Ctrl-C comes when their ids are told
        record = submit(jobs, launcher, sweep_dir, command)
        own = dataclasses.replace(record, jobs=[job for job in record.jobs if job.number in jobs])
        say("\n".join(submission_lines(own, sweep_dir)))
    on_submitted()
    if not launcher.wait:
        return None
    try:
        return watch.follow(
            sweep_dir, lambda: own, lambda: watch.scheduler_states(own), launcher.poll_seconds
        )
    except KeyboardInterrupt:
        say("No longer watching; the jobs go on.\n" + "\n".join(follow_up_lines(own, sweep_dir)))
        raise


def _run_in_pool(
    jobs: Mapping[int, Job], launcher: LocalParallel, sweep_dir: Path, command: Sequence[str]
) -> list[SweepRow]:
    record = new_record(launcher, jobs, command, sweep_dir)
    work = run_jobs(jobs, sweep_dir, record, command)
    make(sweep_dir)
    folder = submission_folder(sweep_dir)
    _describe(sweep_dir)
    write_down(jobs, sweep_dir, command)
    pool = Pool(dict(zip(jobs, work, strict=True)), launcher, folder)
    with_ids = _written_with_ids(record, pool.ids, sweep_dir)
    try:
        return watch.follow(sweep_dir, with_ids, pool.states, launcher.poll_seconds)
    except KeyboardInterrupt:
        say("stopping: the jobs save what they have; Ctrl-C again leaves them to themselves")
        pool.stop()
        watch.follow(sweep_dir, with_ids, pool.states, launcher.poll_seconds)
        raise


def _written_with_ids(
    record: SweepRecord, ids: Callable[[], Mapping[int, str]], sweep_dir: Path
) -> Callable[[], SweepRecord]:
    """Gives the record with the ids of now, and writes it down whenever one has come."""
    written: dict[int, str] = {}

    def with_ids() -> SweepRecord:
        found = dict(ids())
        own = dataclasses.replace(
            record, jobs=[dataclasses.replace(job, id=found.get(job.number)) for job in record.jobs]
        )
        if found != written:
            written.update(found)
            try:
                _beside_others(own, sweep_dir).write(sweep_dir)
            except (RunDirectoryError, ConfigError) as error:  # the jobs go on all the same
                _log.warning("the ids of the jobs are not written down: %s", error)
        return own

    return with_ids


def dry_run(jobs: Mapping[int, Job], launcher: Slurm, sweep_dir: Path) -> tuple[str, bool]:
    """The sbatch script that would be submitted, each job's overrides, and what the cluster says to it.

    Returns:
        All that as text, and whether the cluster would refuse it.

    Raises:
        ConfigError: a configuration holds a secret.
    """
    for job in jobs.values():
        require_no_secrets(job.config)
    script = slurm.sbatch_script(launcher, name_of(jobs), sweep_dir / SUBMITIT, len(jobs))
    lines = [script, "# jobs"]
    lines += [
        f"#   {number}: {shlex.join(redact_command(_own_words(job))) or 'the default'}"
        for number, job in jobs.items()
    ]
    answer = slurm.would_accept(script)
    lines += [
        f"# {answer}" if answer else "# not checked: there is no sbatch here",
        "# nothing was submitted",
    ]
    return "\n".join(lines), answer is not None and answer.startswith(slurm.REFUSED)


def submission_lines(record: SweepRecord, sweep_dir: Path) -> list[str]:
    """What people want to know after a submission: ids, logs, how to look, how to cancel."""
    folder = submission_folder(sweep_dir)
    jobs = "1 job" if len(record.jobs) == 1 else f"{len(record.jobs)} jobs"
    lines = [f"submitted {jobs} to SLURM; runs in {sweep_dir}/<job>"]
    for job in record.jobs[:_SHOWN]:
        assert job.id is not None, "a submitted job has an id"
        lines.append(f"  job {job.number}: {job.id}  {log_paths(folder, job.id)[1]}")
    if len(record.jobs) > _SHOWN:
        lines.append(f"  … and {len(record.jobs) - _SHOWN} more")
    return [*lines, *follow_up_lines(record, sweep_dir)]


def follow_up_lines(record: SweepRecord, sweep_dir: Path) -> list[str]:
    """How to look at a sweep later, and how to cancel it."""
    cancel = slurm.cancel_command([job.id for job in record.jobs if job.id is not None])
    return [f"  look:   spd-run task=sweep_status {command_word('sweep', sweep_dir)}", f"  cancel: {cancel}"]


def name_of(jobs: Mapping[int, Job]) -> str:
    """Name of the jobs in the queue: that of their experiment, if they have one in common."""
    names = {job.config.name for job in jobs.values()}
    return f"spd-{names.pop()}".replace("/", "-") if len(names) == 1 else "spd-sweep"


def _own_words(job: Job) -> list[str]:
    """What was typed for a job, without what is for Hydra or for the launcher."""
    return [
        text
        for text in without_hydra(job.overrides)
        if not text.lstrip("+~").startswith(("launcher=", "launcher."))
    ]


def _beside_others(record: SweepRecord, sweep_dir: Path) -> SweepRecord:
    """The record with the jobs that were started earlier in the same sweep."""
    return SweepRecord.read(sweep_dir).followed_by(record) if (sweep_dir / FILE).exists() else record


def _describe(sweep_dir: Path) -> None:
    """Commit, diff, versions and command line at the moment of submission."""
    path = sweep_dir / _ENVIRONMENT
    if not path.exists():
        try:
            atomic.replace(path, to_json(describe_environment(), indent=2))
        except OSError as error:
            raise cannot("write", path, error) from error


def _take_away(sweep_dir: Path, there: Set[str]) -> None:
    """Remove what was written of jobs that were not submitted, and nothing that was there before."""
    for name in {SUBMITIT, _ENVIRONMENT} - there:
        path = sweep_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if there <= {_OF_HYDRA}:
        (sweep_dir / _OF_HYDRA).unlink(missing_ok=True)
        sweep_dir.rmdir()
