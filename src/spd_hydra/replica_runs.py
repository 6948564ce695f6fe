"""Replicas of one configuration as runs: a directory for each inside the one of all, and the table of them.

<directory>/              config.yaml, status.json, summary.json, sweep.csv, sweep.html of all replicas
<directory>/restarts/     while they choose among initialisations: how far all have come
<directory>/<n>/          replica n: the run of seed + n, as if it had been alone
"""

import contextlib
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from spd_hydra import competition, report
from spd_hydra.build import device_of
from spd_hydra.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    read_state,
    remove_newer,
    steps_of,
    verify,
)
from spd_hydra.command_word import command_word
from spd_hydra.config import RunConfig
from spd_hydra.distributed import say
from spd_hydra.environment import describe_environment
from spd_hydra.finite import TrainingError
from spd_hydra.logger.trackers import Trackers
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.pipeline import Work, prepare
from spd_hydra.precision import products_in
from spd_hydra.rank_errors import RunError
from spd_hydra.replicas import DROPPED, Replicas
from spd_hydra.restarts import begin_with_best
from spd_hydra.result import Outcome
from spd_hydra.run_dir import RunDirectory, RunDirectoryError, Status
from spd_hydra.run_files import RunFiles
from spd_hydra.saved_config import to_yaml
from spd_hydra.saved_run import require_same_data, require_same_target, was_alone
from spd_hydra.section import ConfigError
from spd_hydra.stop import Stopped, StopSignals


def decompose_replicas(
    config: RunConfig, directory: RunDirectory, signals: StopSignals, trackers: Trackers
) -> Outcome:
    """Train `train.replicas` decompositions at once and leave the result of each in a directory of its own.

    What they are tracked with is among `trackers`, to be ended by who calls this.

    Raises:
        RunError: a replica failed; the others have their results.
        Stopped: a signal asked for it.
    """
    started = time.perf_counter()
    directories: list[RunDirectory] = []
    all_work: list[Work] = []
    with contextlib.ExitStack() as stack:
        try:
            for number in range(config.train.replicas):
                directories.append(stack.enter_context(_open(config, directory, number)))
            broken = _dropped_before(directories)
            for number, own in enumerate(directories):
                work = prepare(of_replica(config, number), own, signals, trackers, started)
                work.trainer.facts["machine"]["replicas"] = config.train.replicas
                all_work.append(work)
            with products_in(config.train.precision):
                results = _train(directory, all_work, broken)
            summaries = [
                _conclude(work, result, trackers, config.train.replicas)
                for work, result in zip(all_work, results, strict=True)
            ]
        except BaseException as error:
            _record_end(directories, all_work, error)
            if isinstance(error, TrainingError):
                raise RunError(str(error)) from error
            raise
    return _outcome(config, directory, summaries, results)


def of_replica(config: RunConfig, number: int) -> RunConfig:
    """The configuration of one replica: a run that could be alone."""
    train = dataclasses.replace(config.train, replicas=1)
    return dataclasses.replace(config, seed=config.seed + number, train=train)


def _open(config: RunConfig, directory: RunDirectory, number: int) -> RunDirectory:
    path = directory.path / str(number)
    if path.is_symlink():
        raise RunDirectoryError(f"{path} is a link, which may lead out of the run directory")
    own = RunDirectory.open(path) if (path / "config.yaml").is_file() else RunDirectory.at(path)
    own.write_config(to_yaml(of_replica(config, number)))
    own.write_environment(describe_environment(device_of(config).type))
    return own


def require_common_step(config: RunConfig, directory: RunDirectory) -> None:
    """Refuse to go on with replicas that cannot do so together; nothing is changed.

    Raises:
        ConfigError: one has gone on alone, and would be set back.
        CheckpointError: there are checkpoints, and none of a step that all have.
        RunDirectoryError: one is being written.
    """
    replicas = [RunFiles(directory.path / str(number)) for number in range(config.train.replicas)]
    for own in replicas:
        if own.is_being_written():
            raise RunDirectoryError(
                f"{own.path} is being written by another process: wait for it, or stop it"
            )
    broken = _dropped_before(replicas)
    _common_step([own for number, own in enumerate(replicas) if number not in broken])


def _dropped_before(directories: Sequence[RunFiles]) -> dict[int, TrainingError]:
    """The replicas that dropped out in an earlier session, with the reason."""
    errors = {number: (own.read_status() or {}).get("error") or "" for number, own in enumerate(directories)}
    found = {n: TrainingError(text[len(DROPPED) :]) for n, text in errors.items() if text.startswith(DROPPED)}
    return found if len(found) < len(directories) else {}


def _train(
    directory: RunDirectory, all_work: Sequence[Work], broken: dict[int, TrainingError]
) -> list[Evaluation | TrainingError]:
    left = {number: work for number, work in enumerate(all_work) if number not in broken}
    checkpoints = _common_checkpoints([work.directory for work in left.values()])
    for work, checkpoint in zip(left.values(), checkpoints, strict=True):
        if checkpoint is None:
            work.directory.truncate_metrics(0)
        else:
            require_same_data(work.trainer.facts["data"], checkpoint.state, checkpoint.path.name)
            require_same_target(work.trainer.facts["target"], checkpoint.state, checkpoint.path.name)
            work.trainer.restore(checkpoint)
        work.directory.write_status(Status.running, work.trainer.step)
    group = Replicas([work.trainer for work in all_work])
    group.leave_out(broken)
    step = next(iter(left.values())).trainer.step
    if step:
        competition.remove(directory)  # killed between the checkpoints of those chosen and this
        say(f"going on from step {step}")
        for number in broken:
            all_work[number].trainer.step = step  # takes the steps of the others along, and leaves nothing
        return group.fit()
    seeds = [f"seed {work.parts.config.seed}" for work in all_work]
    states = [work.parts.initial_state for work in all_work]
    errors = begin_with_best(group, states, seeds, directory)
    group.leave_out(broken | {number: error for number, error in enumerate(errors) if error is not None})
    return group.fit()


def _common_checkpoints(directories: Sequence[RunDirectory]) -> list[Checkpoint] | list[None]:
    """Of each replica the checkpoint that it goes on from; newer ones are removed, see `_common_step`."""
    step = _common_step(directories)
    found = [load_checkpoint(own.checkpoints / f"step_{step}") for own in directories if step is not None]
    for own in directories:
        own.require_ownership()
        remove_newer(own.checkpoints, step or 0)
    return found or [None] * len(directories)


def _common_step(replicas: Sequence[RunFiles]) -> int | None:
    """The newest step of which all have a whole checkpoint; None: killed in the first save or before.

    Newer ones are what a save that was interrupted left: all replicas save after the same steps.

    Raises:
        ConfigError: one has gone on alone to a later step, whose checkpoints would be removed.
        CheckpointError: there are checkpoints, and none of a step that all have.
    """
    steps = {own: steps_of(own.checkpoints) for own in replicas}
    for common in sorted(set[int].intersection(*map(set, steps.values())), reverse=True):
        if not any(verify(own.checkpoints / f"step_{common}") for own in replicas):
            _require_none_ahead(steps, common)
            return common
    _require_none_ahead(steps, 0)
    if all(steps.values()) or max(map(len, steps.values())) > 1:
        listed = ", ".join(f"{own.path}: {known or 'none'}" for own, known in steps.items())
        raise CheckpointError(f"the replicas have no step of which all have a whole checkpoint; {listed}")
    return None


def _require_none_ahead(steps: Mapping[RunFiles, Sequence[int]], common: int) -> None:
    for own, known in steps.items():
        alone = [n for n in known if n > common and was_alone(read_state(own.checkpoints / f"step_{n}"))]
        if alone:
            back = f"step {common}" if common else "the beginning"
            raise ConfigError(
                f"resume={own.path.parent}: replica {own.path.name} has gone on alone to step {alone[-1]}; "
                f"it shares only {back} with the others, and would lose the rest. Go on with each alone: "
                f"{command_word('resume', own.path)}"
            )


def _conclude(
    work: Work, result: Evaluation | TrainingError, trackers: Trackers, replicas: int
) -> dict[str, Any] | None:
    """The summary of a replica; None if it failed, which its status then says."""
    if isinstance(result, TrainingError):
        work.directory.write_status(Status.failed, work.trainer.step, error=f"{DROPPED}{result}")
        return None
    summary = work.conclude(result, replicas=replicas)
    work.directory.write_status(Status.done, step=result.step)
    trackers.succeeded(work.tracker, summary)
    return summary


def _record_end(directories: Sequence[RunDirectory], all_work: Sequence[Work], error: BaseException) -> None:
    """All of them ended with the same error, or were stopped."""
    stopped = isinstance(error, KeyboardInterrupt)
    step = error.step if isinstance(error, Stopped) and error.step is not None else None
    for number, own in enumerate(directories):
        if (own.read_status() or {}).get("status") in {Status.done.value, Status.failed.value}:
            continue
        done = all_work[number].trainer.step if number < len(all_work) else 0
        status = Status.stopped if stopped else Status.failed
        text = str(error) if isinstance(error, Stopped) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(RunDirectoryError):  # there is a first error to tell
            own.write_status(status, step=done if step is None else step, error=text)


def _outcome(
    config: RunConfig,
    directory: RunDirectory,
    summaries: Sequence[dict[str, Any] | None],
    results: Sequence[Evaluation | TrainingError],
) -> Outcome:
    named = {number: (config.name, config.seed + number) for number in range(config.train.replicas)}
    rows = report.sweep_rows(directory.path, names_and_seeds=named)
    _, page = report.write_sweep(directory.path, rows)
    say("\n".join([report.sweep_table(rows), f"  {page}"]))
    failed = [(number, result) for number, result in enumerate(results) if isinstance(result, TrainingError)]
    if failed:
        number, first = failed[0]
        raise RunError(f"{len(failed)} of {len(results)} replicas failed; replica {number}: {first}")
    found = [summary for summary in summaries if summary is not None]
    judged = [summary["solved"] for summary in found if summary["solved"] is not None]
    objectives = [summary["objective"] for summary in found if summary["objective"] is not None]
    summary = {
        "experiment": config.name,
        "seed": config.seed,
        "replicas": len(found),
        "steps": found[0]["steps"],
        "solved": all(judged) if judged else None,
        "solved_replicas": sum(judged),
        "objective": sum(objectives) / len(objectives) if objectives else None,
        "seconds": found[0]["seconds"],
    }
    directory.write_summary(summary)
    return Outcome(directory.path, summary)
