"""What people read after a run or a sweep: a page, a table in the terminal."""

from spd_hydra.report.page import write_report
from spd_hydra.report.published import published_table
from spd_hydra.report.sweep import sweep_rows, with_replicas
from spd_hydra.report.sweep_page import write_sweep
from spd_hydra.report.sweep_text import sweep_table
from spd_hydra.report.verdict import verdict_lines, verdict_table

__all__ = [
    "published_table",
    "sweep_rows",
    "sweep_table",
    "verdict_lines",
    "verdict_table",
    "with_replicas",
    "write_report",
    "write_sweep",
]
