"""What a person is shown. Where nobody can be shown anything any more, the work goes on without.

A terminal may be closed, a pipe's reader gone, the disk of a log full: results are worth more than words.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO


def show(text: str, stream: TextIO | None = None, *, end: str = "\n") -> None:
    """Write text to a stream, by default standard output, if it takes it.

    Characters that its encoding does not have are shown as `?`.
    """
    stream = sys.stdout if stream is None else stream
    if stream is None:  # of a process without a terminal, such as one of pythonw or after >&-
        return
    with contextlib.suppress(OSError, ValueError):
        try:
            stream.write(text + end)
        except UnicodeEncodeError:
            known = stream.encoding
            stream.write((text + end).encode(known, errors="replace").decode(known))
        stream.flush()


def is_terminal(stream: TextIO | None) -> bool:
    """Whether somebody sees what is written to the stream."""
    try:
        return stream is not None and stream.isatty()
    except ValueError:  # it is closed
        return False


@contextlib.contextmanager
def output_may_be_lost() -> Iterator[None]:
    """At the end of the block, what standard streams could not write is dropped.

    Otherwise Python tries once more when it ends, and fails, with an exit code of its own.
    """
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None:
                    stream.flush()
            except (OSError, ValueError):
                with contextlib.suppress(OSError, ValueError), Path(os.devnull).open("w") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())
