"""How an error on one rank ends all of them, and how the run comes to say whose error it was.

A rank that fails leaves a note with the reason and closes its connections. The others, which then get an
error in whatever they wait for, look at the notes: an error of its own explains one that only says that the
connection was closed, and a rank without a note died without a word. The other ranks end after rank 0 has
written down what happened, because a scheduler may end a job at the first exit code that is not 0.
"""

import contextlib
import json
import logging
import re
import threading
import time
import traceback
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from spd_hydra import distributed
from spd_hydra.redaction import redact_text
from spd_hydra.run_dir import RunDirectory
from spd_hydra.stop import Stopped

logger = logging.getLogger(__name__)

_NOTE_SECONDS = 2.0  # for the others to leave notes after one of them has gone
_FIRST_ERROR_SECONDS = 0.5  # after the first error that was found, for an earlier one
_CONCLUDE_SECONDS = 10.0  # for rank 0 to write down an error
_SAVE_SECONDS = 1800.0  # for rank 0 to save, where the ranks agreed to stop
_POLL_SECONDS = 0.05
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|socket", re.IGNORECASE)

deaths: dict[int, str] = {}
"""What whoever started the ranks knows of those that ended: `was killed by SIGKILL`, by rank."""

concluded = threading.Event()
"""Set once this process has written down how its run ended: what becomes of others is no news any more."""


class RunError(RuntimeError):
    """The run failed for a reason that its message explains; no traceback is needed."""


class EndedElsewhere(RunError):
    """Another rank ended the run; rank 0 tells why."""


def settle(error: BaseException, directory: RunDirectory | None = None) -> BaseException:
    """Leave the other ranks because of an error, and find out why the run really ended.

    Alone, or after it was settled, that is the error itself.

    Args:
        error: what this rank ended with.
        directory: of the run, for the trace of another rank than 0.
    """
    if distributed.world_size() == 1:
        return error
    rank, size, is_lost = distributed.rank(), distributed.world_size(), _is_lost_contact(error)
    note = _note(error, is_lost)
    if rank != 0 and directory is not None and not is_lost and not isinstance(error, RunError | Stopped):
        path = directory.write_rank_error(rank, note["trace"])
        note["file"] = None if path is None else str(path)
    with contextlib.suppress(dist.DistError):
        distributed.notes().set(f"left/{rank}", json.dumps(note))
    distributed.leave(abruptly=True)
    if not is_lost:
        return error
    return _explained_to_rank_0(size, error) if rank == 0 else _explained_by_rank_0()


def conclude(error: BaseException, size: int, rank: int) -> None:
    """Rank 0 has written down how the run ended; the others wait until it has.

    Args:
        error: what this rank ended with.
        size: number of ranks there were.
        rank: number of this one.
    """
    if size == 1:
        return
    notes = distributed.notes()
    with contextlib.suppress(dist.DistError):  # rank 0 is gone
        if rank == 0:
            concluded.set()
            notes.set("concluded", "yes")
            _read_notes(size, _FIRST_ERROR_SECONDS)
        else:
            seconds = _SAVE_SECONDS if isinstance(error, Stopped) else _CONCLUDE_SECONDS
            notes.wait(["concluded"], timedelta(seconds=seconds))


def _is_lost_contact(error: BaseException) -> bool:
    """Whether an error says no more than that another rank is gone."""
    return isinstance(error, dist.DistError) or (
        type(error) is RuntimeError and bool(_LOST.search(str(error)))
    )


def _note(error: BaseException, is_lost: bool) -> dict[str, Any]:
    text = f"ended itself with exit code {error.code}" if isinstance(error, SystemExit) else _text(error)
    note: dict[str, Any] = {"time": time.time(), "lost": is_lost, "text": redact_text(text), "stopped": None}
    if isinstance(error, Stopped):
        note["stopped"] = [int(error.number), error.step, error.of, error.hands_over]
    note["trace"] = redact_text("".join(traceback.format_exception(error)))
    return note


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"


def _explained_to_rank_0(size: int, error: BaseException) -> BaseException:
    notes = _read_notes(size, _NOTE_SECONDS)
    own = sorted((note["time"], rank) for rank, note in notes.items() if not note["lost"])
    if own:
        rank = own[0][1]
        note = notes[rank]
        if note["stopped"] is not None:
            return _stopped(note["stopped"])
        logger.error("rank %d failed:\n%s", rank, note["trace"])
        kept = f" (trace: {note['file']})" if note.get("file") else ""
        return RunError(f"rank {rank} failed: {note['text']}{kept}")
    silent = [rank for rank in range(1, size) if rank not in notes]
    if not silent:
        return RunError(f"the ranks lost contact with each other: {error}")
    told = [
        f"rank {rank} {deaths.get(rank, 'died without a word: it was killed, or its machine failed')}"
        for rank in silent
    ]
    return RunError("; ".join(told))


def _explained_by_rank_0() -> BaseException:
    deadline = time.monotonic() + _NOTE_SECONDS
    with contextlib.suppress(dist.DistError):
        while time.monotonic() < deadline:
            if distributed.notes().check(["left/0"]):
                note = json.loads(distributed.notes().get("left/0"))
                if note["stopped"] is not None:
                    return _stopped(note["stopped"])
                return EndedElsewhere("another rank failed" if note["lost"] else note["text"])
            time.sleep(_POLL_SECONDS)
    return EndedElsewhere("rank 0 died without a word: it was killed, or its machine failed")


def _stopped(note: list[Any]) -> Stopped:
    number, step, of, hands_over = note
    return Stopped(number, step=step, of=of, hands_over=hands_over)


def _read_notes(size: int, seconds: float) -> dict[int, dict[str, Any]]:
    """Notes of the other ranks, by rank, once all left one or so many seconds have passed."""
    deadline = time.monotonic() + seconds
    found: dict[int, dict[str, Any]] = {}
    while True:
        for rank in range(1, size):
            if rank not in found and distributed.notes().check([f"left/{rank}"]):
                found[rank] = json.loads(distributed.notes().get(f"left/{rank}"))
                if not found[rank]["lost"]:
                    deadline = min(deadline, time.monotonic() + _FIRST_ERROR_SECONDS)
        if time.monotonic() >= deadline or all(r in found or r in deaths for r in range(1, size)):
            return found
        time.sleep(_POLL_SECONDS)
