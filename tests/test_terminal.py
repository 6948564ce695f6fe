"""Words that nobody can be shown cost nothing else."""

import errno
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from spd_hydra.terminal import is_terminal, show


class Broken(io.StringIO):
    """Takes nothing, for the reason it is given."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EIO, "the terminal was closed"),
        OSError(errno.ENOSPC, "no space left on device"),
        BrokenPipeError(),
        ValueError("I/O operation on closed file"),
    ],
)
def test_a_stream_that_takes_nothing_raises_nothing(error: Exception) -> None:
    show("text", Broken(error))


def test_a_process_without_standard_output_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    show("text")
    assert not is_terminal(sys.stdout)


def test_a_closed_stream_is_no_terminal() -> None:
    closed = io.StringIO()
    closed.close()
    assert not is_terminal(closed)


def test_characters_that_an_encoding_lacks_are_replaced_and_the_others_stay() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    show("a · b → c", stream)
    assert raw.getvalue() == b"a ? b ? c\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("guarded", [True, False])
def test_what_a_full_disk_did_not_take_is_no_reason_to_fail_at_the_end(guarded: bool) -> None:
    block = "with output_may_be_lost():" if guarded else "if True:"
    code = f"import sys\nfrom spd_hydra.terminal import *\n{block}\n    sys.stdout.write('text')"
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", code], env=buffered, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, "No space left" in done.stderr) == ((0, False) if guarded else (120, True))
