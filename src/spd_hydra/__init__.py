"""Stochastic Parameter Decomposition: networks taken apart into rank-one subcomponents.

>>> from spd_hydra import compose, decompose, load_run, submit
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spd_hydra.api import JobFailed as JobFailed
    from spd_hydra.api import Run as Run
    from spd_hydra.api import compose as compose
    from spd_hydra.api import decompose as decompose
    from spd_hydra.api import load_run as load_run
    from spd_hydra.api import submit as submit

__all__ = ["JobFailed", "Run", "compose", "decompose", "load_run", "submit"]


def __getattr__(name: str) -> Any:
    # On first use: `spd-run --help` imports this package and needs none of it.
    if name in __all__:
        from spd_hydra import api  # noqa: PLC0415

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
