"""The further ranks of a run on this machine, beside the process that the person sees.

Rank 0 is this process, so that progress, Ctrl-C and verdict stay on its terminal. The others have sessions of
their own: a Ctrl-C reaches rank 0 alone, and the ranks agree on it.
"""

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from spd_hydra import rank_errors
from spd_hydra.exit_code import ExitCode
from spd_hydra.run_dir import RunDirectoryError, Status, written_here

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.1
_GRACE_SECONDS = 15.0  # for rank 0 to fail by itself, and to write down why, after another rank has
_END_SECONDS = 30.0  # for the others to end after rank 0
_LONGEST_TRACE = 4000  # characters

# Ends with the process that started it, whichever way that ends; a signal of Linux, elsewhere it may remain.
_BOUND = """
import ctypes, os, signal, sys
try:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
except (OSError, AttributeError):
    pass
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


@contextlib.contextmanager
def local_ranks(
    number: int, command: Sequence[str], payload: bytes, *, logs: Path | None = None
) -> Iterator[None]:
    """Within the `with` block this process is rank 0 of so many; the others run beside it.

    If one of them ends with an error, the ranks find that out by themselves. Should this process not, it is
    ended, with the other's trace.

    Args:
        number: of ranks, this process included.
        command: starts one of the others, which finds its place in torchrun's variables of its environment.
        payload: what each of the others gets on its standard input.
        logs: folder for what the others print, `rank_<n>.log`; None: a temporary one.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory())) if logs is None else logs
        folder.mkdir(parents=True, exist_ok=True)
        place = {
            "WORLD_SIZE": str(number),
            "LOCAL_WORLD_SIZE": str(number),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
        }
        stack.enter_context(_environment(place | {"RANK": "0", "LOCAL_RANK": "0"}))
        others = _Others(folder)
        stack.callback(others.end)
        for rank in range(1, number):
            others.start(rank, command, payload)
        stack.enter_context(others.watched())
        yield


class _Others:
    """The processes of the other ranks."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._is_over = threading.Event()

    def start(self, rank: int, command: Sequence[str], payload: bytes) -> None:
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        bound = [sys.executable, "-I", "-S", "-c", _BOUND, str(os.getpid()), *command]
        with tempfile.TemporaryFile() as given, self._log(rank).open("wb") as log:
            given.write(payload)
            given.seek(0)
            self._processes[rank] = subprocess.Popen(
                bound, stdin=given, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block, a rank that ends with an error is noticed."""
        rank_errors.concluded.clear()
        watcher = threading.Thread(target=self._watch, daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._is_over.set()
            watcher.join()
            rank_errors.deaths.clear()

    def end(self) -> None:
        """Give the others time to end, then end them."""
        deadline = time.monotonic() + _END_SECONDS
        for rank, process in self._processes.items():
            try:
                process.wait(max(deadline - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                logger.warning("rank %d did not end with the others and is ended", rank)
                process.kill()
                process.wait()

    def _watch(self) -> None:
        while not self._is_over.wait(_POLL_SECONDS):
            for rank, process in self._processes.items():
                if process.poll():
                    self._report(rank, process.returncode)
                    return

    def _report(self, rank: int, code: int) -> None:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        rank_errors.deaths[rank] = how
        deadline = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < deadline:
            if self._is_over.wait(_POLL_SECONDS) or rank_errors.concluded.is_set():
                return
        trace = self._log(rank).read_text(errors="replace")[-_LONGEST_TRACE:]
        text = f"rank {rank} {how}, and rank 0 did not notice"
        logger.error("%s; what it said last:\n%s", text, trace)
        for directory in written_here():
            with contextlib.suppress(RunDirectoryError):
                status = directory.read_status() or {}
                directory.write_status(Status.failed, step=int(status.get("step", 0)), error=text)
        for process in self._processes.values():
            process.kill()
        logging.shutdown()
        os._exit(ExitCode.run_failed)

    def _log(self, rank: int) -> Path:
        return self._folder / f"rank_{rank}.log"


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
