"""What is built before a launch, so that mistakes show before anything is trained."""

import dataclasses

import torch

from spd_hydra import distributed
from spd_hydra.build import Parts, assemble, device_of, untrained_target
from spd_hydra.config import RunConfig
from spd_hydra.launcher_config import Slurm
from spd_hydra.section import ConfigError

_DEFAULT_OBJECTIVE = RunConfig.__dataclass_fields__["objective"].default
_FEW_ROWS = 8
_SMALL = 2**30  # bytes of weights that a check before the launch may make


def preflight(config: RunConfig) -> Parts:
    """Build everything but the trained weights, so that a mistake shows before anything is trained.

    On the meta device, where tensors have shapes and no values: a large model costs no memory.

    Raises:
        ConfigError: naming the key, the value and what is allowed.
    """
    if not isinstance(config.launcher, Slurm):  # else the job has other devices than this machine
        device_of(config)
    meta = torch.device("meta")
    try:
        with meta:
            parts = assemble(config, untrained_target(config), meta)
    except ConfigError:
        raise
    except Exception as error:  # a target or a data source of a plug-in may need values
        _require_small(config, error)
        parts = assemble(config, untrained_target(config), torch.device("cpu"))
    # Ranks that share a run were started from a configuration that was checked before they met.
    if config.objective != _DEFAULT_OBJECTIVE and distributed.world_size() == 1:
        _require_metric(config)
    return parts


def _require_small(config: RunConfig, error: Exception) -> None:
    """Fail where the untrained target would not fit beside whatever else this machine does.

    Args:
        error: why it has to be made.

    Raises:
        ConfigError: names the target, its size and the reason.
    """
    try:
        with torch.device("meta"):
            size = sum(p.numel() * p.element_size() for p in untrained_target(config).parameters())
    except Exception:  # its size cannot be known
        return
    if size > _SMALL:
        reason = (str(error).splitlines() or [""])[0]
        name = getattr(config.model, "name", config.name)
        raise ConfigError(
            f"model: {name} cannot be checked without the values of its weights ({type(error).__name__}: "
            f"{reason}), which are {size / 2**30:.1f} GiB; up to {_SMALL / 2**30:g} GiB are made for a "
            "check. Try a small model of the same kind"
        ) from error


def _require_metric(config: RunConfig) -> None:
    """Fail if no evaluation of this run will have the metric that sweepers optimise.

    Raises:
        ConfigError: names the metrics that there are.
    """
    few = dataclasses.replace(config.eval, batches=1, batch_size=min(config.eval.batch_size, _FEW_ROWS))
    parts = assemble(dataclasses.replace(config, eval=few), untrained_target(config), torch.device("cpu"))
    names = parts.evaluate(0, certified=False).metrics
    if config.objective not in names:
        raise ConfigError(
            f"objective: got {config.objective}, which no evaluation of this run measures; choose one of "
            f"{', '.join(sorted(names))}"
        )
