"""How a run is asked to stop, and how all its ranks come to stop at the same step.

    SIGINT   Ctrl-C: save and stop; exit code 130
    SIGTERM  the machine is wanted back: save and stop; exit code 143
    SIGHUP   the terminal was closed: as SIGTERM; where it is ignored (nohup), it stays so
    SIGUSR1  what many cluster scripts ask for before the time limit: as SIGTERM
    SIGUSR2  time is nearly up: save and hand over to whoever listened to this signal before, such as
             submitit, which queues the job again; where nobody did, as SIGTERM

While steps are taken a signal waits for the end of the step. Before and after, there is nothing to save, and
it ends the run at once. What is saved is a checkpoint, or how far the choice among initialisations has come.
"""

import contextlib
import logging
import multiprocessing.resource_tracker
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from spd_hydra import distributed

logger = logging.getLogger(__name__)

_HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_SECONDS_BETWEEN_TALKS = 0.5


def heard(*numbers: signal.Signals) -> list[signal.Signals]:
    """Those signals that are to be heard: not SIGHUP if it is ignored, as below nohup.

    A shell lets what it starts in the background ignore SIGINT, which still has to stop a run.
    """
    without = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    return [number for number in numbers if number not in without]


@contextlib.contextmanager
def handled_by(
    handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals
) -> Iterator[dict[signal.Signals, Any]]:
    """Within the block these signals go to this handler; gives those of before, which are put back.

    In the main thread alone. A handler that was set outside of Python, which tells it as None, is lost.
    """
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield before
    finally:
        for number, own in before.items():
            signal.signal(number, signal.SIG_DFL if own is None else own)


class Stopped(KeyboardInterrupt):
    """The run was asked to stop and did.

    Attributes:
        number: the signal.
        step: the step that was saved; None: nothing was saved for this stop.
        of: whose step that is, where initialisations are compared; empty: the run's.
        hands_over: rank 0 has somebody who goes on from here.
    """

    def __init__(
        self, number: int, *, step: int | None = None, of: str = "", hands_over: bool = False
    ) -> None:
        super().__init__()
        self.of = of
        self.number, self.step, self.hands_over = signal.Signals(number), step, hands_over

    @property
    def exit_code(self) -> int:
        """As a shell reports a process that SIGINT or SIGTERM ended; the others count as SIGTERM."""
        return 128 + (signal.SIGINT if self.number is signal.SIGINT else signal.SIGTERM)

    @property
    def saved(self) -> str | None:
        """What was saved for this stop, in words; None: nothing."""
        return (
            None
            if self.step is None
            else f"saved at step {self.step}" + (f" of {self.of}" if self.of else "")
        )

    def __str__(self) -> str:
        asked = (
            "interrupted by the user" if self.number is signal.SIGINT else f"stopped by {self.number.name}"
        )
        return asked if self.saved is None else f"{asked}, {self.saved}"


class StopSignals:
    """Hears the signals that ask this process to stop; only in the main thread, which alone gets them."""

    def __init__(self) -> None:
        self._asked: signal.Signals | None = None
        self._is_stepping = False
        self._saving = ""
        self._before: dict[signal.Signals, Any] = {}
        self._successor: Callable[[int, FrameType | None], Any] | None = None
        self._pid = os.getpid()
        self._steps_between_talks = self._steps_left = 1
        self._talked_at: float | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block a signal raises `Stopped`, unless steps are being taken."""
        if self._before or threading.current_thread() is not threading.main_thread():
            yield
            return
        with handled_by(self._hear, *heard(*_HEARD)) as self._before:
            before = self._before.get(signal.SIGUSR2)
            self._successor = before if callable(before) else None
            try:
                yield
            finally:
                self._before = {}

    @contextlib.contextmanager
    def stepping(self, *, saving: str = "a checkpoint") -> Iterator[None]:
        """Within the block a signal waits until `agreed` is asked at the end of a step.

        Args:
            saving: what is saved before the stop, for what is told.
        """
        with self.listening():
            self._is_stepping, self._saving = True, saving
            try:
                yield
            finally:
                self._is_stepping = False

    def agreed(self) -> Stopped | None:
        """At the end of a step, on every rank: what all of them are asked for, if any one is.

        Several ranks talk about it every so many steps, a number by which rank 0 keeps the time between talks
        near half a second; each talk agrees on the next. A GPU is not waited for.
        """
        if distributed.world_size() == 1:
            return None if self._asked is None else Stopped(self._asked, hands_over=self._hands_over)
        self._steps_left -= 1
        if self._steps_left > 0:
            return None
        leads = distributed.rank() == 0
        number, self._steps_left, hands_over = distributed.largest(
            [self._asked or 0, self._next_talk() if leads else 0, leads and self._successor is not None]
        )
        self._steps_between_talks = self._steps_left
        if not number:
            return None
        return Stopped(number, hands_over=bool(hands_over) and number == signal.SIGUSR2)

    def late(self) -> Stopped | None:
        """What was asked for when the last step had begun: its run is whole, but nothing should follow it."""
        return None if self._asked is None else Stopped(self._asked)

    def hand_over(self) -> None:
        """Let whoever listened to SIGUSR2 before do what it wants; the other ranks end.

        Raises:
            SystemExit: on the other ranks, and usually by the one that is called.
        """
        if not distributed.leads():
            raise SystemExit(0)
        if self._successor is not None:
            self._successor(signal.SIGUSR2, None)

    @property
    def _hands_over(self) -> bool:
        return self._asked is signal.SIGUSR2 and self._successor is not None

    def _next_talk(self) -> int:
        """Steps until the next talk, from the time that those since the last one took."""
        now = time.monotonic()
        before, self._talked_at = self._talked_at, now
        if before is None:
            return 1
        steps = int(self._steps_between_talks * _SECONDS_BETWEEN_TALKS / max(now - before, 1e-9))
        return max(1, min(steps, 10 * self._steps_between_talks))

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if (
            os.getpid() != self._pid
        ):  # a fork inherits this handler: of all signals it needs to end by SIGTERM
            if number == signal.SIGTERM:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                os.kill(os.getpid(), signal.SIGTERM)
            return
        if self._asked is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._asked = signal.Signals(number)
        if not self._is_stepping:
            raise Stopped(number, hands_over=self._hands_over)
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        with contextlib.suppress(RuntimeError):  # the signal came in the middle of printing something
            told = "%s: stopping after this step to save %s%s"
            logger.warning(told, self._asked.name, self._saving, again)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Within the block no signal asks for a stop, nor later for one that came meanwhile.

    For writing down how a run ended: when one rank dies, a scheduler tells the others to end at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Not by a mask: another thread, of which gloo has some, would take the signal.
    held = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
    with handled_by(lambda number, frame: None, *held):
        yield


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
    """Processes that are started within the block, forked or spawned, get none of the signals of a stop.

    But for SIGTERM: not SIGINT, SIGHUP, SIGUSR1 or SIGUSR2.
    A scheduler and a terminal send these to every process of a run, and a worker that dies of one takes the
    run with it. For data sources that load in the background:

        with kept_from_children():
            batches = iter(DataLoader(…, num_workers=2))

    The workers inherit the mask of signals; this process gets what came meanwhile at the end of the block.
    """
    held = {signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        # Python starts this process beside the first one that is spawned, and then lets SIGINT pass again.
        multiprocessing.resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, held)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
