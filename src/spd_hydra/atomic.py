"""Files that are either whole or not there, whenever the process or the machine stops."""

import contextlib
import errno
import os
import secrets
from pathlib import Path

_CANNOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES}  # some network file systems


def write_new(path: Path, data: bytes) -> None:
    """Create a file that must not exist yet, and return when its bytes are on the disk.

    Raises:
        OSError: the file exists, the disk is full, or the directory cannot be written.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader finds the old content or the new one, never a part.

    Args:
        path: in a directory that exists.
        data: text becomes UTF-8. What has none, a byte of a path that Python holds as a lone surrogate, is
            written as JSON escapes it, so that it is read back from there as it was.

    Raises:
        OSError: the disk is full or the directory cannot be written; the old content is then still there.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        write_new(temporary, _encoded(data) if isinstance(data, str) else data)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _encoded(text: str) -> bytes:
    return text.encode(errors="backslashreplace")


def sync_directory(path: Path) -> None:
    """Return when the names in a directory are on the disk: a power cut may undo a rename alone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)
