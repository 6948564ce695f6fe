"""How far the training is: a bar on a terminal, a line every half minute elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Never, Self, TextIO

from tqdm import tqdm

from spd_hydra.terminal import is_terminal

logger = logging.getLogger(__name__)

Numbers = Callable[[], Mapping[str, float]]


class Progress:
    """Shows step, the numbers given to `update`, steps per second and the time left.

    The numbers are asked for only when they are about to be shown, because reading them waits for the
    device: at most once per `bar_seconds` on a terminal, once per `line_seconds` elsewhere.

    Args:
        total: the step at which training ends.
        start: the step at which it begins, above 0 after a resume.
        what: the word before the number of steps.
        disable: show nothing.
        stream: where the bar goes; what it is decides between bar and lines. Default: standard error.
        clock: gives seconds.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        what: str = "step",
        disable: bool = False,
        line_seconds: float = 30.0,
        bar_seconds: float = 1.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._what, self._disable, self._clock = total, what, disable, clock
        self._stream = sys.stderr if stream is None else stream
        self._bar: tqdm[Never] | None = None
        self._is_seen = is_terminal(self._stream)
        self._seconds = bar_seconds if self._is_seen else line_seconds
        self._shown_step, self._shown_at = start, clock()
        self._step = start
        self._is_first = True

    def __enter__(self) -> Self:
        self._shown_at = self._clock()
        if not self._disable and self._is_seen:
            self._bar = tqdm(
                total=self._total,
                initial=self._step,
                file=self._stream,
                dynamic_ncols=True,
                unit="it",
                desc=None if self._what == "step" else self._what,
            )
        return self

    def update(self, step: int, numbers: Numbers) -> None:
        """Training has done `step` steps; `numbers` gives what to show beside it, e.g. loss and L0."""
        advance, self._step = step - self._step, step
        if self._disable:
            return
        if self._bar is not None:
            self._bar.update(advance)
        if self._is_first and step < self._total:  # its time is that of compiling, of no use for a forecast
            self._is_first = False
            self._shown_step, self._shown_at = step, self._clock()
        elif step > self._shown_step and (
            self._clock() - self._shown_at >= self._seconds or step >= self._total
        ):
            self._show(numbers())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _show(self, numbers: Mapping[str, float]) -> None:
        texts = {name: format_number(value) for name, value in numbers.items()}
        now = self._clock()
        if self._bar is not None:
            self._bar.set_postfix(texts)
        else:
            rate = (self._step - self._shown_step) / max(now - self._shown_at, 1e-9)
            parts = [f"{self._what} {self._step}/{self._total}"]
            parts += [f"{name} {text}" for name, text in texts.items()]
            parts += [f"{rate:.3g} it/s", f"ETA {format_duration((self._total - self._step) / rate)}"]
            logger.info("  ".join(parts))
        self._shown_step, self._shown_at = self._step, now


def format_number(value: float) -> str:
    """Four significant digits, as short as that allows."""
    return f"{value:.4g}"


def format_duration(seconds: float) -> str:
    """Whole seconds as `45s`, `3m05s` or `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
