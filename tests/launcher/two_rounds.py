"""`spd-run` with a sweeper that chooses its second round by the first and writes what it was told."""

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper

from spd_hydra.cli import main


class TwoRounds(Sweeper):
    """A few learning rates, then two around the best one."""

    def __init__(self, first: Sequence[float]) -> None:
        self._first = list(first)

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        assert self.launcher is not None
        rates, told = self._first, dict[float, float]()
        for _ in range(2):
            jobs = [[*arguments, f"train.lr={rate}"] for rate in rates]
            ended = self.launcher.launch(jobs, initial_job_idx=len(told))
            told |= {rate: job.return_value for rate, job in zip(rates, ended, strict=True)}
            best = min((value, rate) for rate, value in told.items() if math.isfinite(value))[1]
            rates = [best / 3, best * 3]
        Path("told.json").write_text(json.dumps(list(told.items())))


if __name__ == "__main__":
    TwoRounds.__module__ = "hydra_plugins.two_rounds"  # Hydra takes plug-ins from there alone
    sys.modules[TwoRounds.__module__] = sys.modules[__name__]
    node = {"_target_": "hydra_plugins.two_rounds.TwoRounds", "first": [1e-4, 1e-1]}
    ConfigStore.instance().store(group="hydra/sweeper", name="two_rounds", node=node)
    Plugins.instance().register(TwoRounds)
    sys.argv[0] = "spd-run"
    sys.exit(main())
