"""Where `spd-run` begins, so that Ctrl-C while the rest is imported, which takes seconds, ends in a line."""

import sys

from spd_hydra.exit_code import ExitCode


def main() -> int:
    """Do what the command line says, and return the exit code."""
    try:
        from spd_hydra.cli import main as begin  # noqa: PLC0415

        return begin()
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return ExitCode.interrupted
