"""Stochastic Parameter Decomposition: networks taken apart into rank-one subcomponents.

>>> from spd_hydra import compose, decompose, load_run, load_sweep, submit
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spd_hydra.api import JobFailed as JobFailed
    from spd_hydra.api import Run as Run
    from spd_hydra.api import Sweep as Sweep
    from spd_hydra.api import compose as compose
    from spd_hydra.api import decompose as decompose
    from spd_hydra.api import load_run as load_run
    from spd_hydra.api import load_sweep as load_sweep
    from spd_hydra.api import submit as submit

# OpenMP's threads spin while they wait for each other, by default for milliseconds. Two runs of two threads
# on two cores then take a hundred times as long as one: who spins keeps the core that the other needs. This
# is what libgomp itself takes when it knows that cores are scarce; it is read when torch is first imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = ["JobFailed", "Run", "Sweep", "compose", "decompose", "load_run", "load_sweep", "submit"]


def __getattr__(name: str) -> Any:
    # On first use: `spd-run --help` imports this package and needs none of it.
    if name in __all__:
        from spd_hydra import api  # noqa: PLC0415

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    # What completion offers, also before the first use.
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
