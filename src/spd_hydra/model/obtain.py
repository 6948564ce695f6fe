"""A target ready to be decomposed: taken from the cache, or trained and retried until it is certified."""

import dataclasses
import enum
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spd_hydra import rng
from spd_hydra.counted import counted
from spd_hydra.model.base import Measurement, TargetSpec, interval
from spd_hydra.model.training import BatchSource, TrainableTarget, fresh_loss, train
from spd_hydra.model.users_code import told_of
from spd_hydra.model.weights import WeightsError, load_target_weights, save_target
from spd_hydra.section import ConfigError, kind_of

logger = logging.getLogger(__name__)

_FORMAT = 2  # part of the cache key: raise it when training changes its numbers

TargetProgress = Callable[[int, int, int], None]
"""Called with (number of the try from 0, steps done, steps)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedTarget:
    """A frozen target in evaluation mode and how it was come by.

    Attributes:
        module: the target; nothing in it asks for gradients.
        certified: every measurement lies in its interval.
        seed: the derived seed that gave this target (`rng.derived_seed(seed, "target", n)`).
        tries: number of seeds tried, this one included; 0 for a target that is not trained.
        measurements: what certified it, or did not.
        loss: training loss on fresh data; None for a target that is not trained.
        seconds: time spent on obtaining it in this process.
        cached: it was read from the cache.
    """

    module: nn.Module
    certified: bool
    seed: int
    tries: int
    measurements: list[Measurement]
    loss: float | None
    seconds: float
    cached: bool


def obtain_target(
    spec: TargetSpec,
    batches: BatchSource,
    *,
    seed: int,
    device: torch.device | str,
    cache_dir: Path | str | None,
    held_out: BatchSource | None = None,
    progress: TargetProgress | None = None,
) -> TrainedTarget:
    """Build a target; train it if it has a recipe, with the next derived seed until one is certified.

    Args:
        spec: what to build.
        batches: its data; part of the cache key when it is a dataclass, otherwise nothing is cached.
        seed: of the run; try n uses `rng.derived_seed(seed, "target", n)` for weights and data.
        device: where to train and to put the module.
        cache_dir: holds `targets/<key>.safetensors`; None for no cache.
        held_out: data on which the loss of a trained target is measured; None: `batches`, with another key.
        progress: called now and then during training.

    Returns:
        The first certified target, or after `training.max_tries` the one with the lowest loss, uncertified.

    Raises:
        ConfigError: `cache_dir` begins with the home directory of somebody who has none.
    """
    started = time.perf_counter()
    device = torch.device(device)
    if not isinstance(spec, TrainableTarget):
        return _untrained(spec, seed, device, started)
    path = _cache_path(spec, batches, seed, device, cache_dir)
    target = _read_cache(spec, path, device, started) if path is not None else None
    if target is None or (not target.certified and target.tries < spec.training.max_tries):
        target = _train_until_certified(spec, batches, held_out or batches, seed, device, progress, started)
        if path is not None:
            _write_cache(target, path)
    if not target.certified:
        _warn(target, spec)
    return target


def _warn(target: TrainedTarget, spec: TrainableTarget) -> None:
    tries, advice = f"{target.tries} tries; this is the best of them", "Raise model.training.max_tries"
    if spec.training.max_tries == 1:
        # What brought the tries down is not known here: a configuration with target_steps, or the recipe.
        tries = f"1 try of {counted(spec.training.steps, 'step')}"
        advice = (
            "If target_steps is given, as by debug=smoke, the target is not meant to be certified: leave "
            "that out; otherwise raise model.training.max_tries"
        )
    logger.warning(
        "No target was certified in %s, and no decomposition of it "
        "counts as solved. %s or change the recipe; see the summary.",
        tries,
        advice,
    )


def out_of_bounds(measurements: Iterable[Measurement]) -> str:
    """What keeps a target from being certified: `margin -0.6, must be > 0; response 0, must be ≥ 0.5`."""
    return "; ".join(
        f"{one.name} {one.value:.3g}, must be {interval(one.lower, one.upper) or 'a number'}"
        for one in measurements
        if not one.passed
    )


def cache_root(cache_dir: Path | str) -> Path:
    """The directory of the cache, with a home directory at its beginning written out.

    Raises:
        ConfigError: there is no such home directory.
    """
    try:
        return Path(cache_dir).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"cache_dir: got {cache_dir}, but there is no home directory {Path(cache_dir).parts[0]}; choose "
            "another place with cache_dir=…"
        ) from error


def _untrained(spec: TargetSpec, seed: int, device: torch.device, started: float) -> TrainedTarget:
    first = rng.derived_seed(seed, "target", 0)
    with told_of("model", spec, "build"):
        module = _frozen(spec.build(rng.generator(first, "target_weights")).to(device))
    return _judged(spec, module, None, seed=first, tries=0, cached=False, started=started)


def _train_until_certified(
    spec: TrainableTarget,
    batches: BatchSource,
    held_out: BatchSource,
    seed: int,
    device: torch.device,
    progress: TargetProgress | None,
    started: float,
) -> TrainedTarget:
    best: TrainedTarget | None = None
    recipe = spec.training
    for number in range(recipe.max_tries):
        this_seed = rng.derived_seed(seed, "target", number)
        with told_of("model", spec, "build"):
            module = spec.build(rng.generator(this_seed, "target_weights")).to(device)

        def report(step: int, number: int = number) -> None:
            if progress is not None:
                progress(number, step, recipe.steps)

        last_chance = number == recipe.max_tries - 1 and best is None
        key = rng.key(this_seed, "target_data")
        if not train(spec, module, batches, key, may_give_up=not last_chance, report=report):
            continue
        loss = fresh_loss(spec, module, held_out, rng.key(this_seed, "target_loss"))
        target = _judged(
            spec, _frozen(module), loss, seed=this_seed, tries=number + 1, cached=False, started=started
        )
        if target.certified:
            return target
        if best is None or _rank(target) < _rank(best):
            best = target
    if best is None:
        raise AssertionError("the last try is always trained to its end")
    return dataclasses.replace(best, tries=recipe.max_tries, seconds=time.perf_counter() - started)


def _rank(target: TrainedTarget) -> float:
    """Its loss, by which the best of those that are not certified is taken; one that diverged comes last."""
    return math.inf if target.loss is None or math.isnan(target.loss) else target.loss


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def _judged(
    spec: TargetSpec,
    module: nn.Module,
    loss: float | None,
    *,
    seed: int,
    tries: int,
    cached: bool,
    started: float,
) -> TrainedTarget:
    measurements = list(spec.certify(module))
    if isinstance(spec, TrainableTarget) and loss is not None and spec.training.max_loss is not None:
        measurements.append(Measurement(name="loss", value=loss, lower=0, upper=spec.training.max_loss))
    return TrainedTarget(
        module=module,
        certified=all(measurement.passed for measurement in measurements),
        seed=seed,
        tries=tries,
        measurements=measurements,
        loss=loss,
        seconds=time.perf_counter() - started,
        cached=cached,
    )


def _cache_path(
    spec: TrainableTarget,
    batches: BatchSource,
    seed: int,
    device: torch.device,
    cache_dir: Path | str | None,
) -> Path | None:
    """Named by everything that the trained numbers depend on."""
    data: Any = batches
    if cache_dir is None or not dataclasses.is_dataclass(data) or isinstance(data, type):
        return None
    identity = {
        "format": _FORMAT,
        "model": [kind_of(type(spec)) or type(spec).__qualname__, dataclasses.asdict(spec)],
        "data": [type(data).__qualname__, dataclasses.asdict(data)],
        "seed": seed,
        "torch": torch.__version__,
        "device": device.type,
    }
    text = json.dumps(identity, sort_keys=True, default=_plain)
    name = hashlib.sha256(text.encode()).hexdigest()
    return cache_root(cache_dir) / "targets" / f"{name}.safetensors"


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    raise TypeError(f"cannot name a cached target by a value of type {type(value).__name__}")


def _read_cache(
    spec: TrainableTarget, path: Path, device: torch.device, started: float
) -> TrainedTarget | None:
    module = spec.build(rng.generator(0, "target_weights"))
    try:
        metadata = load_target_weights(module, path)
        seed, tries, loss = int(metadata["seed"]), int(metadata["tries"]), float(metadata["loss"])
    except FileNotFoundError:
        return None
    except (OSError, WeightsError, KeyError, ValueError) as error:
        logger.warning("The cached target cannot be used and is trained again: %s", error)
        return None
    module = _frozen(module.to(device))
    return _judged(spec, module, loss, seed=seed, tries=tries, cached=True, started=started)


def _write_cache(target: TrainedTarget, path: Path) -> None:
    loss = math.nan if target.loss is None else target.loss
    metadata = {"seed": str(target.seed), "tries": str(target.tries), "loss": repr(loss)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_target(target.module, path, metadata)
    except OSError as error:
        logger.warning("The trained target could not be cached: %s. The run goes on.", error)
