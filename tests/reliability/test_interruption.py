"""A save that is ended by SIGKILL after any of its system calls leaves a whole checkpoint."""

import ctypes
import functools
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from spd_hydra.checkpoint import load_newest, save_checkpoint, verify

TRACE_ME, CONTINUE_TO_CALL, SET_OPTIONS = 0, 24, 0x4200
MARK_CALLS, KILL_WITH_TRACER = 0x1, 0x100000

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="traces system calls with Linux's ptrace"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a place: thousands of saves that a kill ends, not a power cut."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def trace(request: int, pid: int, value: int = 0) -> None:
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.restype, ptrace.argtypes = ctypes.c_long, [ctypes.c_long] * 2 + [ctypes.c_void_p] * 2
    if ptrace(request, pid, None, value) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def killed_after_call(number: int, work: Callable[[], object]) -> bool:
    """Do the work in a process that is killed when its `number`-th system call has been made, from 1."""
    pid = os.fork()
    if pid == 0:
        try:
            trace(TRACE_ME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            work()
        finally:
            os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSTOPPED(status), "the process waits to be traced"
    trace(SET_OPTIONS, pid, MARK_CALLS | KILL_WITH_TRACER)
    stops = 0
    while stops < 2 * number:  # every call stops it twice: before it is made, and after
        trace(CONTINUE_TO_CALL, pid)
        status = os.waitpid(pid, 0)[1]
        if not os.WIFSTOPPED(status):
            return False
        stops += os.WSTOPSIG(status) == signal.SIGTRAP | 0x80
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return True


def save(directory: Path, step: int, note: str = "") -> None:
    tensors = {"model": {"V": torch.full((3, 2), float(step))}, "optimizer": {"V.step": torch.ones(1)}}
    save_checkpoint(directory, step, tensors, {"step": step, "note": note}, keep=2)


def refuse_warning(message: str) -> None:
    raise AssertionError(f"unexpected warning: {message}")


def state(directory: Path) -> tuple[int, str]:
    """Step and note of the newest checkpoint, all of which must be whole."""
    assert all(verify(path) == [] for path in directory.glob("step_*"))
    loaded = load_newest(directory, refuse_warning)
    assert loaded is not None
    assert torch.equal(loaded.tensors["model"]["V"], torch.full((3, 2), float(loaded.step)))
    return loaded.step, str(loaded.state["note"])


@pytest.mark.parametrize(
    ("step", "first"), [(3, False), (2, False), (1, True)], ids=["new", "again", "first"]
)
def test_killed_after_any_system_call_of_a_save_a_whole_checkpoint_is_there(
    folder: Path, step: int, first: bool
) -> None:
    before = None if first else (2, "before")
    results, number = set(), 0
    while True:
        number += 1
        directory = folder / str(number) / "checkpoints"
        directory.parent.mkdir()
        if not first:
            save(directory, 1)
            save(directory, 2, note="before")
            (directory / f".tmp_{socket.gethostname()}_{2**22}_0123abcd").mkdir()  # of a process that is gone
        killed = killed_after_call(number, functools.partial(save, directory, step, note="after"))
        if first and not list(directory.glob("step_*")):
            assert load_newest(directory, refuse_warning) is None
            results.add(before)
        else:
            results.add(state(directory))
        save(directory, 4)  # the next save tidies up
        assert state(directory) == (4, "")
        assert not list(directory.glob(".tmp_*")), number
        if not killed:
            break
    print(f"killed after each of {number - 1} system calls")
    assert results == {before, (step, "after")}, (
        "some kills come before the new checkpoint has its name, some after"
    )
    assert number > 40, "a save was expected to make more system calls"
