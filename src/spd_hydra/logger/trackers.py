"""The trackers of a run and their common end, which waits for servers and so comes after all else."""

import dataclasses
import logging
import threading
import time
from typing import Any

from spd_hydra.logger.base import Logger

logger = logging.getLogger(__name__)


class Trackers:
    """Trackers that were begun for a run; one, or one for each replica."""

    def __init__(self) -> None:
        self._ends: list[_End] = []

    def begun(self, tracker: Logger) -> None:
        """To be ended by `finish`: as a failure, unless `succeeded` says otherwise."""
        self._ends.append(_End(tracker))

    def succeeded(self, tracker: Logger, summary: dict[str, Any]) -> None:
        """What this one reports came to its end, with this summary."""
        next(end for end in self._ends if end.tracker is tracker).summary = summary

    def finish(self) -> None:
        """End all of them side by side; after the longest of their `finish_seconds` they are left behind."""
        ends, self._ends = self._ends, []
        threads = [threading.Thread(target=end.finish, daemon=True) for end in ends]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + max((end.tracker.finish_seconds for end in ends), default=0.0)
        for thread in threads:
            thread.join(max(deadline - time.monotonic(), 0.0))
        if left := sum(thread.is_alive() for thread in threads):
            logger.warning("%d of %d trackers did not end in time and are left behind", left, len(ends))


@dataclasses.dataclass
class _End:
    """How a tracker is to be ended: without a summary, as a failure."""

    tracker: Logger
    summary: dict[str, Any] | None = None

    def finish(self) -> None:
        try:
            self.tracker.finish(self.summary, 1 if self.summary is None else 0)
        except Exception as error:  # the run is over and written down
            logger.warning("a tracker could not be ended: %s: %s", type(error).__name__, error)
