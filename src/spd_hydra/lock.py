"""A lock on a file that one process holds and that ends with that process, however it ends.

A cluster that loses sight of a node starts its job anew elsewhere, while the old process goes on and holds
the lock. So the file also names its owner. A later start of the same job may take that over; whoever asks
`require_ours` before it writes then learns that it is the owner no more.

Some network file systems have no locks. There the file alone tells who writes: its owner renews its time
whenever it writes something, and signs off at its end. `_require_gone` says when another may sign.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import secrets
import socket
import time
import weakref
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

logger = logging.getLogger(__name__)

_TAKEN = {errno.EWOULDBLOCK, errno.EACCES}
_TRIES, _PAUSE = 5, 0.05  # `is_held` takes the lock for a moment; whoever meets it tries again
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}
_SILENT_SECONDS = 1800.0  # of an owner on another machine, where locks do not work, until it counts as gone
_WAIT_SECONDS = 60.0  # for a process that lost its ownership to find that out, and to end
_LENGTH = 1024  # of what the file says: always as long, so that one write replaces all of it


class LockedError(RuntimeError):
    """Another process holds the lock; the message says which."""


class TakenOverError(RuntimeError):
    """Another process is the owner now; the message says which, and how that came about."""


@dataclass(frozen=True)
class Owner:
    """Who writes: a token of this process alone and, on a cluster, its job and how often that was started."""

    token: str
    job: str | None
    start: int

    @classmethod
    def here(cls) -> Self:
        """This process."""
        array, task = (os.environ.get(f"SLURM_ARRAY_{name}") for name in ("JOB_ID", "TASK_ID"))
        job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")
        if job is not None:
            job = f"{os.environ.get('SLURM_CLUSTER_NAME', '')}/{job}"
        restarts = os.environ.get("SLURM_RESTART_COUNT", "")
        return cls(secrets.token_hex(8), job, int(restarts) if restarts.isdecimal() else 0)

    def follows(self, other: "Owner | None") -> bool:
        """Whether this is a later start of the other's job."""
        return (
            other is not None and self.job is not None and self.job == other.job and self.start > other.start
        )


class FileLock:
    """Holds the lock on a file from its making until `release` or the end of the process.

    Child processes made by a fork do not hold it: a data worker that outlives a killed run blocks nobody.

    Raises:
        LockedError: it is held already, by another process or by this one.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.owner = Owner.here()
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor: int | None = os.open(path, flags, 0o666)
        self._has_locks = True
        try:
            self._is_locked = self._take()
        except BaseException:
            os.close(self._descriptor)
            raise
        _held.add(self)

    def _take(self) -> bool:
        assert self._descriptor is not None, "the file was opened just before"
        try:
            self._has_locks = _lock(self._descriptor, self._path)
            if not self._has_locks:
                _require_gone(self._path)
        except LockedError as error:
            if not self.owner.follows(_owner_in(self._path)):
                raise
            self._sign()
            logger.warning("taking over %s from %s, an earlier start of this job", self._path.parent, error)
            return not self._has_locks or self._wait(_WAIT_SECONDS)
        self._sign()
        return True

    def _sign(self, *, is_over: bool = False) -> None:
        assert self._descriptor is not None, "a released lock is not signed"
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": f"{datetime.now():%F %T}",
            "token": self.owner.token,
            "job": self.owner.job,
            "start": self.owner.start,
            "is_over": is_over,
        }
        os.pwrite(self._descriptor, json.dumps(holder).encode().ljust(_LENGTH), 0)

    def _wait(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self._try():
                return True
            time.sleep(_PAUSE)
        logger.warning("its process still holds the lock after %g s; it will write nothing more", seconds)
        return False

    def _try(self) -> bool:
        assert self._descriptor is not None, "a released lock is not taken again"
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def require_ours(self) -> None:
        """Return if nobody else, such as a later start of this job, has signed the file.

        Raises:
            TakenOverError: somebody has; this process must write nothing more.
        """
        if not is_owner(self._path, self.owner.token):
            raise TakenOverError(_new_owner(self._path, self.owner))
        if not self._has_locks and self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)
        if not self._is_locked:  # the earlier process may have ended by now
            self._is_locked = self._try()

    def release(self) -> None:
        """Give the lock back; harmless when done twice. The file stays: everyone must lock the same one."""
        if self._descriptor is not None and not self._has_locks:
            with contextlib.suppress(OSError):
                if is_owner(self._path, self.owner.token):
                    self._sign(is_over=True)
        self.let_go()

    def let_go(self) -> None:
        """Close the file without a word, as the end of the process would."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @staticmethod
    def is_held(path: Path) -> bool | None:
        """Whether some process holds the lock; None: it cannot be told, where locks do not work."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        except OSError:
            return None
        try:
            # A shared lock asks without becoming an exclusive holder, also where the file is read-only.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                return True
            return False if _has_ended(_read_if_there(path)) else None
        finally:
            os.close(descriptor)
        return False


def is_owner(path: Path, token: str) -> bool:
    """Whether the process with this token owns what the lock file stands for."""
    for _ in range(_TRIES):
        try:
            if (found := _read(path)) is not None:
                return bool(found.get("token") == token)
        except FileNotFoundError:
            return True  # with its directory; whoever writes there will say so
        time.sleep(_PAUSE)  # some file systems show the file while it is being written
    return False


def _lock(descriptor: int, path: Path) -> bool:
    """Take the lock; False where there are no locks."""
    for more_tries in reversed(range(_TRIES)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                logger.warning("%s lies where locks do not work: let only one run write there.", path)
                return False
            if error.errno not in _TAKEN:
                raise
            if not more_tries:
                raise LockedError(_text_of(_read(path))) from None
        time.sleep(_PAUSE)
    raise AssertionError("the last try returns or raises")


def _read(path: Path) -> dict[str, Any] | None:
    """What the holder wrote; opened anew each time, because network file systems then look at the server."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _read_if_there(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError):
        return _read(path)
    return None


def _owner_in(path: Path) -> Owner | None:
    try:
        found = _read(path) or {}
        return Owner(str(found["token"]), found["job"], int(found["start"]))
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _require_gone(path: Path) -> None:
    """Refuse, where locks do not work, to sign in the place of an owner that may still write.

    An owner is gone that has signed off, whose process on this machine has ended, or that has written nothing
    for long: one that was killed on another machine keeps nobody away for good.

    Raises:
        LockedError: says who it is, and what to do if it is gone.
    """
    holder = _read_if_there(path)
    if _has_ended(holder):
        return
    is_here = holder is not None and holder.get("host") == socket.gethostname()
    if is_here or time.time() - path.stat().st_mtime < _SILENT_SECONDS:
        raise LockedError(
            f"{_text_of(holder)}, as far as can be told where locks do not work (if it has ended, remove "
            f"{path})"
        )


def _has_ended(holder: dict[str, Any] | None) -> bool:
    """Whether what the holder wrote shows that it is gone; where there is nothing, there was none."""
    if holder is None or holder.get("is_over") is True:
        return True
    pid = holder.get("pid")
    if holder.get("host") != socket.gethostname() or not isinstance(pid, int) or pid <= 0:
        return False
    if pid == os.getpid():  # else its number has come round again
        return holder.get("token") not in {lock.owner.token for lock in _held if lock._descriptor is not None}
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False
    return False


def _new_owner(path: Path, before: Owner) -> str:
    """Who signed in the place of an owner, and why that could be."""
    now = _owner_in(path)
    if now is None:
        return "another process"
    is_later = now.follows(before)
    how = "a later start of the same job" if is_later else "which opened it too, where locks do not work"
    return f"{_text_of(_read_if_there(path))}, {how}"


def _text_of(holder: dict[str, Any] | None) -> str:
    if holder is None or not {"pid", "host", "since"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"


_held: "weakref.WeakSet[FileLock]" = weakref.WeakSet()


def _let_go_in_child() -> None:
    for lock in list(_held):
        lock.let_go()


os.register_at_fork(after_in_child=_let_go_in_child)
