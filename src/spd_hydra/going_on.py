"""The command that goes on with a run: where it ran, and on as many processes."""

import shlex
from pathlib import Path

from spd_hydra.command_word import command_word
from spd_hydra.launcher_config import Background, Launcher
from spd_hydra.overrides import assignment
from spd_hydra.saved_config import to_dict


def going_on(run_dir: Path, launcher: Launcher, ranks: int) -> str:
    """What to type to go on with a run, to be pasted into a shell.

    Args:
        run_dir: its directory.
        launcher: what its job was asked with.
        ranks: how many processes it had, all told.
    """
    return " ".join(["spd-run", command_word("resume", run_dir), *_words(launcher, ranks)])


def _words(launcher: Launcher, ranks: int) -> list[str]:
    """The words that choose this launcher: its kind, and what is set otherwise than by default."""
    if not isinstance(launcher, Background):  # ranks beside this process, whoever started them
        return [f"launcher.ranks_per_node={ranks}"] if ranks > 1 else []
    plain, default = to_dict(launcher), to_dict(type(launcher)())
    changed = [(f"launcher.{key}", value) for key, value in plain.items() if value != default[key]]
    return [f"launcher={launcher.kind}", *(shlex.quote(assignment(key, value)) for key, value in changed)]
