"""No logger besides the files of the run directory, which are always written."""

import dataclasses

from spd_hydra.logger.base import LoggerSpec
from spd_hydra.section import register


@register("logger", "files")
@dataclasses.dataclass(kw_only=True)
class Files(LoggerSpec):
    """The run directory alone: metrics.jsonl, summary.json, figures and report."""
