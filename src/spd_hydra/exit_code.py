"""How `spd-run` ends."""

import enum


class ExitCode(enum.IntEnum):
    """What the shell, or a scheduler, learns about a run."""

    ok = 0
    run_failed = 1
    bad_config = 2
    jobs_failed = 3
    interrupted = 130
    terminated = 143
