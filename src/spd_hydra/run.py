"""One run: what is asked for, in which directory, by which ranks, and what is said of its end."""

import contextlib
import dataclasses
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from spd_hydra import competition, distributed, rank_errors
from spd_hydra.analyse import analyse
from spd_hydra.build import device_of
from spd_hydra.checkpoint import CheckpointError, read_state, require_whole, step_of
from spd_hydra.command_word import command_word
from spd_hydra.config import RunConfig, Task
from spd_hydra.distributed import say
from spd_hydra.environment import describe_environment
from spd_hydra.going_on import going_on
from spd_hydra.logger.trackers import Trackers
from spd_hydra.pipeline import check, decompose, remarks
from spd_hydra.prefetch import prefetch
from spd_hydra.preflight import preflight
from spd_hydra.rank_errors import RunError as RunError
from spd_hydra.replica_runs import decompose_replicas, of_replica, require_common_step
from spd_hydra.result import Outcome
from spd_hydra.run_dir import RunDirectory, RunDirectoryError, Status
from spd_hydra.run_files import CONFIG
from spd_hydra.saved_config import differences, load_config, to_yaml
from spd_hydra.saved_run import MAY_CHANGE, TOLD_MAY_CHANGE, machine, require_own_config, rounding_note
from spd_hydra.section import ConfigError
from spd_hydra.sources import MAY_MOVE, from_sources, may_move, pinned, sources, with_whole_paths
from spd_hydra.start import fetch_start, pinned_start, require_whole_start
from spd_hydra.stop import Stopped, StopSignals, unheard

log = logging.getLogger(__name__)


def run(
    config: RunConfig,
    *,
    run_dir: Path | None = None,
    saved: RunConfig | None = None,
) -> Outcome:
    """Do what `config.task` says, together with the other ranks where there are several.

    Args:
        config: the whole configuration; for a resume, the saved one with the changes applied.
        run_dir: where to write, for a job of a sweep; None: a new folder below `out_dir`.
        saved: the configuration as it was saved, for a resume.

    Raises:
        ConfigError: the configuration cannot work; nothing was trained.
        RunError: training failed.
        Stopped: a signal asked for it.
        KeyboardInterrupt: the user stopped it at once, with a second Ctrl-C.
    """
    distributed.set_threads(config.threads)
    if config.task is Task.check:
        return Outcome(None, check(config))
    if config.task is Task.prefetch:
        return Outcome(None, prefetch(config))
    if config.task is Task.analyse:  # the work of one rank
        return analyse(config) if distributed.leads() else Outcome(None, {})
    signals, trackers = StopSignals(), Trackers()
    on_gpu = device_of(config).type == "cuda"
    try:
        with signals.listening(), distributed.process_group(torch.device("cuda" if on_gpu else "cpu")):
            outcome = _together(
                lambda: _lead(config, run_dir, saved, signals, trackers),
                lambda: _follow(config, signals, trackers),
            )
    except BaseException as error:
        try:
            if isinstance(error, Stopped) and error.hands_over:
                signals.hand_over()
        finally:  # which may wait for a server, and a requeue has no time for that
            trackers.finish()
        raise
    with signals.listening(), contextlib.suppress(Stopped):  # which ends the wait alone: the run is whole
        trackers.finish()
    return dataclasses.replace(outcome, late_stop=signals.late())


def _together(lead: Callable[[], Outcome], follow: Callable[[], Outcome]) -> Outcome:
    """Rank 0's work on rank 0 and the others' on the others; an error on one ends all."""
    size, rank = distributed.world_size(), distributed.rank()
    try:
        if rank == 0:
            outcome = lead()
            rank_errors.concluded.set()
            return outcome
        with _quiet():
            return follow()
    except BaseException as error:
        with unheard():
            settled = rank_errors.settle(error)
            rank_errors.conclude(settled, size, rank)
        if settled is error:
            raise
        raise settled from error


def _lead(
    config: RunConfig,
    run_dir: Path | None,
    saved: RunConfig | None,
    signals: StopSignals,
    trackers: Trackers,
) -> Outcome:
    """Open the run directory, tell the others where it is, and do the run."""
    _require_rows(config)
    if config.resume is None:
        config, opened = _begin(config, run_dir)
    else:
        config, opened = _reopen(config, saved)
    with opened as directory:
        finished = _finished(config, directory)
        told: dict[str, Any] = {
            "path": str(directory.path.absolute()),
            "token": directory.token,
            "task": config.task.name,
        }
        told["sources"] = sources(config)
        if finished is not None:
            steps = finished.summary["steps"]
            say(f"{directory.path} has finished its {steps} steps: nothing to do. Raise train.steps to go on")
            distributed.of_rank_0(told | {"finished": True})
            return finished

        if not _is_moved(config, directory):  # else once model and text are known to be the same
            directory.write_config(to_yaml(config))

        def work() -> Outcome:
            directory.write_environment(describe_environment(device_of(config).type))
            for note in config.data.notes():
                say(note)
            distributed.of_rank_0(told)
            do = decompose_replicas if _has_replicas(config) else decompose
            return do(config, directory, signals, trackers)

        return _recorded(directory, config, work)


def _is_moved(config: RunConfig, directory: RunDirectory) -> bool:
    """Whether model or text of a run that goes on are said to lie elsewhere than before."""
    path = directory.path / CONFIG
    return path.exists() and any(key in MAY_MOVE for key, _, _ in differences(load_config(path), config))


def _has_replicas(config: RunConfig) -> bool:
    return config.train.replicas > 1 and config.task is Task.decompose


def _follow(config: RunConfig, signals: StopSignals, trackers: Trackers) -> Outcome:
    """Do the run in the directory that rank 0 writes."""
    told = distributed.of_rank_0()
    if told.get("finished"):
        return Outcome(Path(told["path"]), {})
    config = from_sources(_for_its_run(config, Task[told["task"]]), told["sources"])
    directory = RunDirectory.follow(Path(told["path"]), told["token"])
    return _recorded(directory, config, lambda: decompose(config, directory, signals, trackers))


def _begin(config: RunConfig, run_dir: Path | None) -> tuple[RunConfig, RunDirectory]:
    """Check everything, fix what a hub may change, then make and lock the directory of a new run."""
    for line in remarks(preflight(config)):
        say(line)
    config = pinned(pinned_start(config))
    require_whole_start(config)
    root = Path(config.out_dir).expanduser()
    with contextlib.ExitStack() as on_error:
        directory = RunDirectory.create(root, config.name) if run_dir is None else RunDirectory.at(run_dir)
        on_error.enter_context(directory)
        fetch_start(config, directory)
        on_error.pop_all()
    return config, directory


def _reopen(config: RunConfig, saved: RunConfig | None) -> tuple[RunConfig, RunDirectory]:
    """Lock the directory of a run that was stopped, to go on from its newest whole checkpoint.

    Raises:
        ConfigError: the changes would make it another run, or one of fewer steps than are done, or a replica
            has gone on alone; nothing was changed.
        CheckpointError: there are checkpoints and every one is damaged; nothing was changed.
    """
    assert config.resume is not None, "a resume needs a directory"
    path = Path(config.resume)
    saved = saved if saved is not None else load_config(path / "config.yaml")
    changed = [
        (key, old, new)
        for key, old, new in differences(saved, config)
        if not key.startswith((*MAY_CHANGE, *may_move(saved)))
    ]
    if changed:
        lines = "\n".join(f"  {key}: {old} → {new}" for key, old, new in changed)
        raise ConfigError(
            f"resume={path}: these changes would make it another run:\n{lines}\n"
            f"Only {TOLD_MAY_CHANGE} may change; for others start a new run, or begin one with what this one "
            f"has learned: {command_word('start_from', path)}"
        )
    config = with_whole_paths(_for_its_run(config, saved.task))
    with contextlib.ExitStack() as on_error:
        directory = on_error.enter_context(RunDirectory.open(path))
        if _finished(config, directory) is None or config.train.steps < saved.train.steps:
            _require_to_fit(directory, config, saved)
        on_error.pop_all()
    return config, directory


def _require_to_fit(directory: RunDirectory, config: RunConfig, saved: RunConfig) -> None:
    """Find what speaks against going on from the newest checkpoints before anything is written."""
    now, notes = machine(device_of(config).type, replicas=config.train.replicas), []
    newest = [require_whole(folder) for folder in _checkpoint_folders(directory, config)]
    done = max((step_of(path) for path in newest if path is not None), default=0)
    if done > config.train.steps:
        raise ConfigError(
            f"train.steps: got {config.train.steps}, but the run has done {done}; "
            "a run cannot go back, start a new one"
        )
    states = {n: (path.name, read_state(path)) for n, path in enumerate(newest) if path is not None}
    if not states:
        states = {n: (competition.WHAT, said) for n, said in enumerate(competition.said_in(directory.path))}
    for number, (name, state) in states.items():
        own = of_replica(saved, number) if _has_replicas(saved) else saved
        require_own_config(directory.path, own, state, name)
        notes.append(rounding_note(directory.path, now, state))
    if _has_replicas(config):
        require_common_step(config, directory)
    for note in dict.fromkeys(note for note in notes if note is not None):
        log.warning("%s", note)


def _for_its_run(config: RunConfig, task: Task) -> RunConfig:
    """The configuration without the words that opened its directory again."""
    return dataclasses.replace(config, resume=None, trust_remote_code=False, task=task)


def _finished(config: RunConfig, directory: RunDirectory) -> Outcome | None:
    """The result of a run that has nothing left to do."""
    summary, status = directory.read_summary() or {}, directory.read_status() or {}
    steps = summary.get("steps")
    if not isinstance(steps, int) or steps < config.train.steps or status.get("status") != Status.done.value:
        return None
    return Outcome(directory.path, summary)


def _require_rows(config: RunConfig) -> None:
    ranks = distributed.world_size()
    for key, rows in (("train", config.train.batch_size), ("eval", config.eval.batch_size)):
        if rows < ranks:
            raise ConfigError(f"{key}.batch_size: got {rows}, must be ≥ {ranks}, the number of ranks")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What every rank would log is logged by rank 0."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        yield
    finally:
        logging.disable(before)


def _checkpoint_folders(directory: RunDirectory, config: RunConfig) -> list[Path]:
    """Where the checkpoints of a run are, or those of its replicas."""
    if not _has_replicas(config):
        return [directory.checkpoints]
    return [directory.path / str(number) / "checkpoints" for number in range(config.train.replicas)]


def _recorded(directory: RunDirectory, config: RunConfig, work: Callable[[], Outcome]) -> Outcome:
    """Do the work of a run; its status file says how that went, whatever happens."""
    directory.write_status(Status.running, step=_last_step(directory))
    try:
        outcome = work()
    except BaseException as error:
        with unheard():
            settled = rank_errors.settle(error, directory)
            with contextlib.suppress(RunDirectoryError):  # there is a first error to tell
                _record_end(directory, config, settled)
        if settled is error:
            raise
        raise settled from error
    directory.write_status(Status.done, step=int(outcome.summary.get("steps", 0)))
    return outcome


def _record_end(directory: RunDirectory, config: RunConfig, error: BaseException) -> None:
    if not isinstance(error, KeyboardInterrupt):
        foreseen = isinstance(error, RunError | RunDirectoryError | CheckpointError | ConfigError)
        trace = None if foreseen else "".join(traceback.format_exception(error))
        text = f"{type(error).__name__}: {error}"
        directory.write_status(Status.failed, _last_step(directory), error=text, traceback=trace)
        return
    text = str(error) if isinstance(error, Stopped) else "interrupted by the user"
    saved = error.step if isinstance(error, Stopped) else None
    directory.write_status(Status.stopped, step=_last_step(directory) if saved is None else saved, error=text)
    hint = going_on(directory.path, config.launcher, distributed.started_with())
    if isinstance(error, Stopped) and error.saved is not None:
        say(f"{error.saved}; go on with: {hint}")
    elif competition.exists(directory.path):
        say(f"stopped without saving; go on with {competition.WHAT} as it was saved last: {hint}")
    elif any(directory.path.glob("**/checkpoints/step_*")):
        say(f"stopped without saving; go on from the newest checkpoint with: {hint}")
    else:
        say(f"stopped before anything was saved; begin again in the same directory with: {hint}")


def _last_step(directory: RunDirectory) -> int:
    rows = directory.read_metrics()
    return int(rows[-1]["step"]) if rows else 0
