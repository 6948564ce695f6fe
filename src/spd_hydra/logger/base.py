"""What a logger must offer. The local files are written by the run directory whatever the logger is."""

import dataclasses
from pathlib import Path
from typing import Any

from spd_hydra.section import Section


class Logger:
    """Receives what a run reports. This one forgets it: the local files are enough.

    Attributes:
        finish_seconds: how long `finish` is waited for, at most.
    """

    finish_seconds: float = 60.0

    def log(self, step: int, split: str, values: dict[str, float]) -> None:
        """Numbers of one step; `split` is `train` or `eval`."""

    def log_figures(self, step: int, figures: dict[str, Path]) -> None:
        """PNG files that were just drawn, by name."""

    def finish(self, summary: dict[str, Any] | None, exit_code: int) -> None:
        """The run ended; called exactly once, also after an exception (then without a summary).

        By then all is written down and the other ranks have been told. In a thread of its own.
        """


@dataclasses.dataclass(kw_only=True)
class LoggerSpec(Section):
    """Where metrics go besides the run directory."""

    def start(self, run_dir: Path, name: str, config: dict[str, Any]) -> Logger:
        """Begin to log a run, or go on with it when the run directory was logged before."""
        return Logger()
