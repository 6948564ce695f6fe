"""What is built before a launch, so that mistakes show before anything is trained."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spd_hydra import distributed, rng
from spd_hydra.build import Parts, assemble, bound, device_of, untrained_target
from spd_hydra.config import RunConfig
from spd_hydra.data.base import Batches
from spd_hydra.launcher_config import Slurm
from spd_hydra.loss.base import statistics_problem
from spd_hydra.loss.divergence import Divergence
from spd_hydra.metric.ablations import TARGET, ZERO
from spd_hydra.model.hf_config import first_line
from spd_hydra.model.tokens_in import TokensIn
from spd_hydra.model.users_code import UsersCodeError, is_users, told_of
from spd_hydra.run_files import CONFIG
from spd_hydra.section import ConfigError
from spd_hydra.start import require_fit

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
    parts, passes = _parts(config)
    if parts.model.device.type == "meta" and (is_users(config.model) or is_users(config.data)):
        _require_same_numbers(config)
    _require_statistics(config)
    if config.loss.divergence is Divergence.kl:
        with passes:
            _require_classes(parts)
    if not is_begun(config):  # a run that was has what it began with in its own directory
        require_fit(config, parts)
    # Ranks that share a run were started from a configuration that was checked before they met.
    if config.objective != _DEFAULT_OBJECTIVE and distributed.world_size() == 1:
        _require_metric(config)
    return parts


def is_begun(config: RunConfig) -> bool:
    """Whether a configuration goes on with a run: by `resume`, or since its `run_dir` holds one."""
    directory = config.own_directory
    return config.resume is not None or (directory is not None and (directory / CONFIG).is_file())


def _parts(config: RunConfig) -> tuple[Parts, AbstractContextManager[Any]]:
    """The parts, without values if they can do without, and what their target has to run within."""
    meta = torch.device("meta")
    reasons: list[Exception] = []
    # Some models of transformers read values unless they see that they are traced, as on fake tensors.
    for passes in (nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        try:
            with meta, _without_torchs_log():
                return assemble(config, untrained_target(config), meta, passes=passes), passes
        except Exception as error:  # a target or a data source of a plug-in may need values
            if isinstance(error, ConfigError) and not isinstance(error, UsersCodeError):
                raise
            reasons.append(error)
    return _with_values(config, reasons[0]), nullcontext()


@contextmanager
def _without_torchs_log() -> Iterator[None]:
    """Keep torch from writing a traceback of what fails on fake tensors, which is tried otherwise then."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _with_values(config: RunConfig, error: Exception) -> Parts:
    """The parts on the CPU.

    Args:
        error: why they cannot do without values.

    Raises:
        ConfigError: they would be too large, or the target cannot be run on what it gets.
    """
    _require_small(config, error)
    target = untrained_target(config)
    _require_runs(config, target)
    return assemble(config, target, torch.device("cpu"))


def _require_small(config: RunConfig, error: Exception) -> None:
    """Fail where the untrained target would not fit beside whatever else this machine does.

    Args:
        error: why it has to be made.

    Raises:
        ConfigError: names the target, its size and the reason.
    """
    size = _weights_size(config)
    if size is not None and size > _SMALL:
        name = getattr(config.model, "name", config.name)
        raise ConfigError(
            f"model: {name} cannot be checked without the values of its weights ({type(error).__name__}: "
            f"{first_line(error)}), which are {size / 2**30:.1f} GiB; up to {_SMALL / 2**30:g} GiB are made "
            "for a check. Try a small model of the same kind"
        ) from error


def _weights_size(config: RunConfig) -> int | None:
    """Bytes of the target's weights; None: they cannot be known without making them."""
    try:
        with torch.device("meta"):
            return sum(p.numel() * p.element_size() for p in untrained_target(config).parameters())
    except Exception:
        return None


def _require_same_numbers(config: RunConfig) -> None:
    """Run a target of a user's own with values, if it is small: on the meta device float64 fits float32.

    Raises:
        ConfigError: it does not take the rows of the data.
    """
    size = _weights_size(config)
    if size is not None and size <= _SMALL:
        _require_runs(config, untrained_target(config))


def _require_runs(config: RunConfig, target: nn.Module) -> None:
    """Fail where the target cannot be run on rows of the data: of other widths, or where it needs images too.

    Raises:
        ConfigError: says which rows, or which model, and what it says of them.
    """
    batches = bound(config)
    with told_of("data", config.data, "bind's batches"):
        batch = _few_rows(batches, config.seed, torch.device("cpu"))
        if not isinstance(batch, torch.Tensor):
            raise TypeError(f"rows are {type(batch).__name__}, must be one tensor")
    try:
        with torch.no_grad():
            target.eval()(batch)
    except ConfigError:
        raise
    except Exception as error:
        if isinstance(target, TokensIn):
            name = getattr(config.model, "name", config.name)
            raise ConfigError(
                f"model.name: got {name}, which cannot be run on token ids alone: {first_line(error)}; give "
                "a model that needs nothing else"
            ) from error
        if not (is_users(config.model) or is_users(config.data)):
            raise
        dtype = str(batch.dtype).removeprefix("torch.")
        reason = first_line(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"data: rows of shape {list(batch.shape[1:])}, dtype {dtype}, do not fit the target: {reason}; "
            f"{type(config.data).__name__}.bind has to give what the model's forward takes"
        ) from error


@torch.no_grad()
def _require_statistics(config: RunConfig) -> None:
    """Try the loss terms of a user's own on a few rows, with an untrained target if that is small.

    Raises:
        ConfigError: names the term, what it gave and what it must give, or where it failed.
    """
    own = {name: term for name, term in config.loss.extra.items() if is_users(term)}
    size = _weights_size(config) if own else None
    if size is None or size > _SMALL:
        return
    parts = assemble(_of_few_rows(config), untrained_target(config), torch.device("cpu"))
    objective, measured = parts.objective, config.loss.measured_terms(config.eval.also)
    batch, draws = parts.eval_sampler()(0)
    inputs, own_draws = objective.inputs(batch), objective.draws_of(measured, draws)
    for name, term in own.items():
        if name not in measured:
            continue
        key, schedule = f"loss.extra.{name}", objective.scheduled(0.0, {name: term})
        with told_of(key, term, "statistics"):
            found = objective.statistics(inputs, {name: term}, own_draws[name], schedule)[name]
        with told_of(key, term, "value"):
            problem = statistics_problem(term, found)
        if problem is not None:
            raise ConfigError(f"{key}: {problem}")


@torch.no_grad()
def _require_classes(parts: Parts) -> None:
    """Fail where KL would compare the chances of a single class.

    Raises:
        ConfigError: the last axis of the target's output has length 1.
    """
    model = parts.model
    shape = model(_few_rows(parts.batches, parts.config.seed, model.device)).shape
    if shape[-1] == 1:
        raise ConfigError(
            f"loss.divergence: got kl, but the target's output, {list(shape)}, has a single class, whose "
            "chance is always 1; use loss.divergence=mse"
        )


def _of_few_rows(config: RunConfig) -> RunConfig:
    few = dataclasses.replace(config.eval, batches=1, batch_size=min(config.eval.batch_size, _FEW_ROWS))
    return dataclasses.replace(config, eval=few)


def _few_rows(batches: Batches, seed: int, device: torch.device) -> torch.Tensor:
    rows = torch.arange(_FEW_ROWS, dtype=torch.int32, device=device)
    return batches(rng.key(seed, "example").to(device), rows)


def _require_metric(config: RunConfig) -> None:
    """Fail if no evaluation of this run will have the metric that sweepers optimise.

    Raises:
        ConfigError: names the metrics that there are.
    """
    parts = assemble(_of_few_rows(config), untrained_target(config), torch.device("cpu"))
    names = set(parts.evaluate(0, certified=False).metrics)
    # Where all off is no worse than an untrained target, no share is recovered; of the trained one it may be.
    masked = [name.removeprefix("ce/") for name in names if name.startswith("ce/")]
    names |= {f"ce_recovered/{kind}" for kind in masked if kind not in {TARGET, ZERO}}
    if config.objective not in names:
        raise ConfigError(
            f"objective: got {config.objective}, which no evaluation of this run measures; choose one of "
            f"{', '.join(sorted(names))}"
        )
