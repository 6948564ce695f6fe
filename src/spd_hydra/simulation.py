"""What a training step needs, found by taking it on tensors that have shapes and no values."""

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from spd_hydra import rng
from spd_hydra.accumulation import AccumulatedStep
from spd_hydra.build import Parts
from spd_hydra.compiling import Kernel, compiled_by
from spd_hydra.decomposition.compiled_blocks import CompiledBlocks
from spd_hydra.decomposition.roots import roots_without_values
from spd_hydra.loss.objective import Objective
from spd_hydra.optimizer import adamw
from spd_hydra.planning import Planner
from spd_hydra.sampler import position_index
from spd_hydra.step import Ascent, Step
from spd_hydra.trainer import compiles_blocks
from spd_hydra.trainer_config import Sharding

_UPDATE_ACCESSES = 7  # gradient, parameter and two moments read, the last three written
_INPUT_ACCESSES = 2  # written when they are drawn, read by the step
_PARTS = 2  # that are simulated of an accumulated step: a further one changes no peak


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needs:
    """What one process needs for a step.

    Attributes:
        trained: parameters that are trained.
        frozen: parameters of the target.
        resident: bytes that are held between two steps: parameters, gradients and moments.
        peak: most bytes that tensors take at a time, `resident` included, in a step that is not compiled.
        flops: floating-point operations of matrix products, 2·m·k·n each, backward passes included.
        moved: bytes that have to be moved at least: operands and results of matrix products, parameters,
            gradients and moments, batch and random numbers.
    """

    trained: int
    frozen: int
    resident: int
    peak: int
    flops: int
    moved: int

    def times(self, replicas: int) -> "Needs":
        """Of several decompositions that are trained at once, each with a target of its own."""
        return Needs(**{name: replicas * value for name, value in dataclasses.asdict(self).items()})


def simulate(
    parts: Parts, *, rows: int, device: torch.device, ranks: int = 1, shard: Sharding = Sharding.none
) -> Needs:
    """Take an uncompiled step with these parts, which may be on the meta device, on tensors without values.

    Args:
        parts: of the run; afterwards they are as they were.
        rows: of the global batch that this process works on.
        device: where the run would compute.
        ranks: processes that take the step together.
        shard: what they share out.
    """
    with _steps(parts, rows, device, ranks, shard, compile=False) as steps:
        watch, sampler = steps.watched(), steps.sampler
        parameters = list(parts.model.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        return Needs(
            trained=trained,
            frozen=sum(p.numel() for p in parameters) - trained,
            resident=watch.live,
            peak=watch.peak,
            flops=round(watch.flops * sampler.scale),
            moved=round((watch.moved + _INPUT_ACCESSES * sampler.drawn) * sampler.scale)
            + 4 * trained  # gradients written
            + 4 * _UPDATE_ACCESSES * trained // steps.sharers,
        )


def planned_peak(
    parts: Parts, *, rows: int, device: torch.device, ranks: int = 1, shard: Sharding = Sharding.none
) -> int:
    """Most bytes that tensors take at a time in a compiled step, `Needs.resident` included.

    The step, or each of its blocks, is traced and lowered as a run does it, but no code is made of it: the
    compiler's plan says what its kernels allocate.

    Args:
        parts: of the run; afterwards they are as they were.
        rows: of the global batch that this process works on.
        device: where the run would compute.
        ranks: processes that take the step together.
        shard: what they share out.

    Raises:
        Exception: whatever the compiler says about a step that it cannot plan.
    """
    planner = Planner()
    with compiled_by(planner), _steps(parts, rows, device, ranks, shard, compile=True) as steps:
        steps.take()  # what is compiled is planned when it first runs
        if planner.error is not None:  # a block without a plan ran as it is
            raise planner.error
        return steps.watched(planner).peak


@contextlib.contextmanager
def _steps(
    parts: Parts, rows: int, device: torch.device, ranks: int, shard: Sharding, *, compile: bool
) -> Iterator["_Steps"]:
    """Steps on tensors without values, within the block."""
    row = parts.batches(rng.key(parts.config.seed, "example"), torch.arange(1, dtype=torch.int32))
    example = _Example(row, device)
    with FakeTensorMode(allow_non_fake_inputs=True), _without_values(parts.objective, device):
        yield _Steps(parts, rows, example, ranks, shard, compile=compile)


class _Steps:
    """Steps as one process of a run takes them.

    Attributes:
        sampler: of batches and random numbers.
        sharers: processes among which the optimiser's work is divided.
    """

    def __init__(
        self, parts: Parts, rows: int, example: "_Example", ranks: int, shard: Sharding, *, compile: bool
    ) -> None:
        objective, model, settings = parts.objective, parts.model, parts.config.train
        model.roots = roots_without_values(model, example(1))
        self.sampler = _Draws(parts, rows, example, compile=compile)
        if compile and compiles_blocks(objective, settings):
            model.compiled_blocks, compile = CompiledBlocks(), False
        groups = [list(model.component_parameters()), list(model.ci_parameters())]
        self.sharers = 1 if shard is Sharding.none else ranks
        pieces = _Pieces([p for group in groups for p in group], self.sharers) if ranks > 1 else None
        updated = groups if pieces is None else [pieces.of(group) for group in groups]
        self._optimizer = adamw(updated, lr=settings.lr, weight_decay=0.0)
        self._objective = objective
        self._ascent = Ascent(objective, compile=compile)
        self._step: Step | AccumulatedStep
        if settings.accumulate == 1:
            self._step = Step(objective, compile=compile, pieces=pieces)
        else:
            self._step = AccumulatedStep(objective, self.sampler, compile=compile, pieces=pieces)

    def take(self) -> None:
        """What adversaries climb before the step, gradients and update."""
        schedule = self._objective.scheduled(0.0)
        if isinstance(self._step, AccumulatedStep):
            parts = self._step.parts
            self._ascend(lambda: parts(0))
            self._step(0, schedule)
        else:
            batch, draws = self.sampler(0, 0)
            self._ascend(lambda: [(batch, draws)])
            self._step(batch, draws, schedule)
        self._optimizer.step()

    def _ascend(self, parts: Callable[[], Iterable[tuple[Tensor, Tensor]]]) -> None:
        for _ in range(self._objective.adversary.extra_ascents):
            self._ascent(parts())  # how the sources then climb is not worth counting

    def watched(self, planner: Planner | None = None) -> "_Watch":
        """What is seen in a step that has gradients and moments before it, as all but the first have."""
        watch = _Watch()
        with watch:
            for module in (self._objective.model, self._objective.adversary):
                watch.see([*module.parameters(), *module.buffers()])
            self._optimizer.state.clear()
            for parameter in (p for group in self._optimizer.param_groups for p in group["params"]):
                parameter.grad = torch.empty_like(parameter)
            self._optimizer.step()  # makes the moments
            watch.begin()
            if planner is not None:
                planner.reach = watch.reach
            self.take()
        return watch


class _Pieces:
    """Of each parameter what one of several processes updates: its share, or all of it."""

    def __init__(self, parameters: Iterable[nn.Parameter], sharers: int) -> None:
        self._sharers = sharers
        self._pieces = {p: nn.Parameter(self._own(p.detach())) for p in parameters}

    def of(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        return [self._pieces.get(parameter, parameter) for parameter in parameters]

    def sums(self, parameters: Iterable[nn.Parameter], gradients: Iterable[Tensor]) -> list[Tensor]:
        return [
            # What is sent is a copy, and what comes of it another.
            self._own(gradient.clone()).clone() if parameter in self._pieces else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]

    def _own(self, tensor: Tensor) -> Tensor:
        """The largest piece, in the memory of the tensor."""
        return tensor.reshape(-1)[: -(-tensor.numel() // self._sharers)]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts bytes of tensors that are alive, operations, and bytes that products read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.flops = self.moved = 0
        self._known: set[int] = set()

    def begin(self) -> None:
        """Count a step from here."""
        self.flops = self.moved = 0
        self.peak = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.see(tree_leaves(out))
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        if packet in flop_registry or func.namespace not in ("aten", "prim", "prims"):
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.moved += sum(tensor.nbytes for tensor in tensors)
        return out

    def reach(self, size: int) -> None:
        """Count memory that is needed for a moment, beside all that is alive."""
        self.peak = max(self.peak, self.live + size)

    def see(self, leaves: list[Any]) -> None:
        """Count the memory of tensors that are new, until it is free."""
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage._cdata in self._known:
                continue
            self._known.add(storage._cdata)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self.live -= size


class _Draws:
    """Batches and random numbers of the right shapes, in parts, as `SplitSampler` gives them.

    Attributes:
        scale: the work of all parts over that of the simulated ones.
        drawn: bytes of batches and random numbers in one pass over the parts.
    """

    def __init__(self, parts: Parts, rows: int, example: "_Example", *, compile: bool) -> None:
        device, number = parts.model.device, parts.config.train.accumulate
        self.rows = torch.arange(rows, dtype=torch.int32, device=device).tensor_split(number)[:_PARTS]
        self.rows_per_step = parts.config.train.batch_size
        self.scale = rows / sum(len(own) for own in self.rows)
        self.drawn = 0
        self._example, self._shape = example, parts.position_shape
        self._columns = parts.objective.columns(parts.config.loss.active_terms()).to(device)
        self._key = rng.key(0, "shapes").to(device)
        self._draw: Callable[..., Tensor] = Kernel(rng.uniform) if compile else rng.uniform

    def __call__(self, step: int, part: int) -> tuple[Tensor, Tensor]:
        rows = self.rows[part]
        batch = self._example(len(rows))
        draws = self._draw(self._key, position_index(rows, self._shape), self._columns)
        self.drawn = batch.nbytes + draws.nbytes + (self.drawn if part else 0)
        return batch, draws


class _Example:
    """Batches of the shape that the data have, without values."""

    def __init__(self, row: Tensor, device: torch.device) -> None:
        self._shape, self._dtype, self._device = row.shape[1:], row.dtype, device

    def __call__(self, rows: int) -> Tensor:
        return torch.empty((rows, *self._shape), dtype=self._dtype, device=self._device)


@contextlib.contextmanager
def _without_values(objective: Objective, device: torch.device) -> Iterator[None]:
    """Put tensors without values in place of all parameters and buffers, ties and copies kept."""
    model = objective.model
    made: dict[int, Tensor] = {}

    def empty(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            is_parameter = isinstance(tensor, nn.Parameter)
            made[id(tensor)] = nn.Parameter(like, tensor.requires_grad) if is_parameter else like
        return made[id(tensor)]

    before: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in [*model.modules(), *model.patched.module.modules(), *objective.adversary.modules()]:
        tables: list[Any] = [module._parameters, module._buffers]
        before += [(own, dict(own)) for own in tables]
    for own, tensors in before:
        own.update({name: None if tensor is None else empty(tensor) for name, tensor in tensors.items()})
    roots, compiled_blocks = model.roots, model.compiled_blocks
    try:
        yield
    finally:
        model.roots, model.compiled_blocks = roots, compiled_blocks
        for own, tensors in before:
            own.update(tensors)
