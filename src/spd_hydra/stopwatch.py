"""What a run has spent its time on, in all its sessions."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Stopwatch:
    """Seconds of a run by what they were spent on, and the steps that were taken in those of training.

    Attributes:
        started: when the run began, by `time.perf_counter`; moved back by what earlier sessions took.
        seconds: by what they were spent on.
        steps: those that `seconds["train"]` counts, of all initialisations, without one that compiled.
    """

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds = {"compile": 0.0, "train": 0.0, "eval": 0.0}
        self.steps = 0

    @contextmanager
    def counting(self, what: str) -> Iterator[None]:
        """Count the seconds of the block as spent on this."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[what] += time.perf_counter() - started

    def state(self) -> dict[str, Any]:
        """Seconds, those since the start among them as `total`, and steps, for a checkpoint."""
        seconds = self.seconds | {"total": time.perf_counter() - self.started}
        return {"seconds": seconds, "timed_steps": self.steps}

    def add(self, earlier: Mapping[str, Any]) -> None:
        """Add what `state` said in an earlier session, or in its last checkpoint if it was killed."""
        for what, seconds in earlier.get("seconds", {}).items():
            if what == "total":
                self.started -= seconds
            else:
                self.seconds[what] = self.seconds.get(what, 0.0) + seconds
        self.steps += earlier.get("timed_steps", 0)
