"""A lock on a file that one process holds and that ends with that process, however it ends."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
import weakref
from datetime import datetime
from pathlib import Path

logger = logging.getLogger(__name__)

_TAKEN = {errno.EWOULDBLOCK, errno.EACCES}
_TRIES, _PAUSE = 5, 0.05  # `is_held` takes the lock for a moment; whoever meets it tries again
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}


class LockedError(RuntimeError):
    """Another process holds the lock; the message says which."""


class FileLock:
    """Holds the lock on a file from its making until `release` or the end of the process.

    Child processes made by a fork do not hold it: a data worker that outlives a killed run blocks nobody.

    Raises:
        LockedError: it is held already, by another process or by this one.
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor: int | None = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(self._descriptor, path)
        except BaseException:
            os.close(self._descriptor)
            raise
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": f"{datetime.now():%F %T}"}
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(holder).encode(), 0)
        _held.add(self)

    def release(self) -> None:
        """Give the lock back; harmless when done twice. The file stays: everyone must lock the same one."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    @staticmethod
    def is_held(path: Path) -> bool:
        """Whether some process holds the lock."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            # A shared lock asks without becoming an exclusive holder, also where the file is read-only.
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno in _TAKEN
        finally:
            os.close(descriptor)
        return False


def _lock(descriptor: int, path: Path) -> None:
    for more_tries in reversed(range(_TRIES)):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                logger.warning("%s lies where locks do not work: let only one run write there.", path)
                return
            if error.errno not in _TAKEN:
                raise
            if not more_tries:
                raise LockedError(_holder(descriptor)) from None
        time.sleep(_PAUSE)


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
        return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "another process"


_held: "weakref.WeakSet[FileLock]" = weakref.WeakSet()


def _let_go_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_let_go_in_child)
