"""A training step as CUDA graphs: what it launches is recorded once and then replayed.

The step of a toy model is dozens of small kernels, and to launch them one by one takes longer than they run.
A CUDA graph launches them all at once, on the memory they were recorded with. So what differs from step to
step (keys, learning rate, scheduled values) has a fixed place on the device, which one small copy fills.
Nothing waits for the GPU: a step costs the CPU that copy and two launches.
"""

import contextlib
import gc
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from spd_hydra import distributed
from spd_hydra.loss.objective import Objective, ScheduledValues, StepLoss
from spd_hydra.optimizer import group_rates
from spd_hydra.sampler import Sampler, StackedSampler
from spd_hydra.step import StackedStep, Step

logger = logging.getLogger(__name__)

REHEARSALS = 3
"""Steps before the first recording: they compile, tune and allocate, which cannot be recorded."""
_WORDS_APART = 4  # 16 bytes: where compiled kernels expect a tensor to begin

T = TypeVar("T")


class Recorder(Protocol):
    """How device work is done, recorded and repeated."""

    def rehearse(self, work: Callable[[], T]) -> T:
        """Do the work in the way in which it will be recorded."""

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Do the work and record it.

        Returns:
            The results, and what repeats the work: on the same tensors, into the same results.

        Raises:
            RuntimeError: it cannot be recorded; nothing was done.
        """


class CudaRecorder:
    """Records on a stream of its own, on which the work was rehearsed."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def rehearse(self, work: Callable[[], T]) -> T:
        """Do the work between what was launched before and what will be launched after."""
        present = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(present)
        with torch.cuda.stream(self._stream):
            results = work()
        present.wait_stream(self._stream)
        return results

    def record(self, work: Callable[[], T]) -> tuple[T, Callable[[], None]]:
        """Record the work, which launches nothing, then replay it."""
        graph = torch.cuda.CUDAGraph()
        with (
            torch.cuda.stream(self._stream),  # which the next line may not leave when the recording fails
            _no_garbage_collection(),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            results = work()
        graph.replay()
        return results, graph.replay


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A compiled kernel that is collected is unloaded from the GPU, which would end a recording."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class StepInputs:
    """Numbers that differ from step to step, side by side in one piece of memory.

    Args:
        examples: tensors of four-byte numbers, of the shapes that will be given.
        device: where `tensors`, the places of the numbers, are.
    """

    def __init__(self, examples: Sequence[Tensor], device: torch.device) -> None:
        sizes = [-(-tensor.numel() // _WORDS_APART) * _WORDS_APART for tensor in examples]
        starts = list(itertools.accumulate(sizes, initial=0))
        self._memory = torch.zeros(starts[-1], dtype=torch.int32, device=device)
        self._pinned = device.type == "cuda"
        self._places = list(zip(starts, examples, strict=False))
        self.tensors = self._cut(self._memory)

    def fill(self, values: Sequence[Tensor]) -> None:
        """Put values from the CPU into their places. A GPU does that after all it was given before."""
        # Fresh every time, because the last one may not have been read yet; torch keeps it until it was.
        sent = torch.zeros(len(self._memory), dtype=torch.int32, pin_memory=self._pinned)
        for place, value in zip(self._cut(sent), values, strict=True):
            place.copy_(value)
        self._memory.copy_(sent, non_blocking=True)

    def _cut(self, memory: Tensor) -> list[Tensor]:
        return [
            memory[start : start + like.numel()].view(like.dtype).view(like.shape)
            for start, like in self._places
        ]


class _Piece(Generic[T]):
    """A part of the step: rehearsed, then recorded, then replayed; or launched, where that failed."""

    def __init__(self, what: str, work: Callable[[], T], recorder: Recorder) -> None:
        self._what, self._work, self._recorder = what, work, recorder
        self._recorded: tuple[T, Callable[[], None]] | None = None
        self._failed = False

    @property
    def is_recorded(self) -> bool:
        """Whether its results are at a fixed place."""
        return self._recorded is not None

    def __call__(self, *, record: bool) -> T:
        """Do it; record it, if it may be recorded from now on."""
        if self._recorded is not None:
            results, replay = self._recorded
            replay()
            return results
        if self._failed:
            return self._work()
        if not record:
            return self._recorder.rehearse(self._work)
        try:
            self._recorded = self._recorder.record(self._work)
        except RuntimeError as error:
            self._failed = True
            text = "%s cannot be recorded as a CUDA graph and is launched kernel by kernel: %s"
            logger.warning(text, self._what, _in_a_line(error))
            return self._work()
        return self._recorded[0]


def _in_a_line(error: BaseException) -> str:
    """First lines of an error and of the one before it: what ends a broken recording raises another."""
    errors = [error, error.__context__] if error.__context__ is not None else [error]
    return ", after: ".join(next(iter(str(one).splitlines()), type(one).__name__) for one in errors)


class GraphedStep:
    """Two graphs: data, losses and gradients; then, after a look at these where one is due, the update.

    The state that training changes stays where it is: parameters, and the optimiser's moments, which must
    be set in place from the first step on (`optimizer.in_same_memory`).

    Args:
        sampler: draws on the device.
        step: computes losses and gradients.
        objective: knows the scheduled values.
        optimizer: takes its learning rate from a tensor from now on.
        update: clips the gradients and takes the optimiser's step.
        recorder: how it is recorded.
    """

    def __init__(
        self,
        *,
        sampler: Sampler | StackedSampler,
        step: Step | StackedStep,
        objective: Objective,
        optimizer: torch.optim.Optimizer,
        update: Callable[[], None],
        recorder: Recorder,
    ) -> None:
        self._sampler, self._step, self._objective = sampler, step, objective
        self._names = [(term, name) for term, own in objective.schedule(0.0).items() for name in own]
        self._optimizer = optimizer
        scalars = [torch.zeros(())] * (len(optimizer.param_groups) + len(self._names))
        self._inputs = StepInputs([*sampler.keys(0), *scalars], objective.model.device)
        data_key, mask_key, *others = self._inputs.tensors
        rates, scheduled = others[: len(optimizer.param_groups)], others[len(optimizer.param_groups) :]
        schedule: ScheduledValues = {}
        for (term, name), place in zip(self._names, scheduled, strict=True):
            schedule.setdefault(term, {})[name] = place
        for group, lr in zip(optimizer.param_groups, rates, strict=True):
            group |= {"lr": lr, "capturable": True}

        def compute() -> tuple[StepLoss, tuple[Tensor, ...]]:
            return step.compute(*sampler.draw(data_key, mask_key), schedule)

        self._compute = _Piece("the loss", compute, recorder)
        self._update = _Piece("the update", update, recorder)
        self._rehearsed = 0

    def gradients(self, number: int, *, lr: float, progress: float) -> StepLoss:
        """Losses of a step, in memory that the next step overwrites; its gradients are in the parameters.

        Args:
            number: of the step.
            lr: learning rate of the update that follows.
            progress: in [0, 1], for scheduled values.
        """
        schedule = self._objective.schedule(progress)
        numbers = [*group_rates(self._optimizer, lr), *(schedule[term][name] for term, name in self._names)]
        scalars = [torch.tensor(value, dtype=torch.float32) for value in numbers]
        self._inputs.fill([*self._sampler.keys(number), *scalars])
        loss, gradients = self._compute(record=self._rehearsed >= REHEARSALS)
        self._rehearsed += 1
        self._step.leave(gradients)
        return loss

    def update(self) -> None:
        """Clip and update."""
        # What is recorded reads the gradients where they are now: they must come to that place ever after.
        self._update(record=self._compute.is_recorded)


def graphed_step(
    wanted: bool,
    *,
    sampler: Sampler | StackedSampler,
    step: Step | StackedStep,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    update: Callable[[], None],
) -> GraphedStep | None:
    """The step as CUDA graphs; None on a CPU and, with a line in the log that says why, if that cannot be."""
    device = objective.model.device
    if device.type != "cuda" or not wanted:
        return None
    reason = obstacle(
        compiled=step.is_compiled,
        from_keys=sampler.from_keys,
        lasting=bool(objective.adversary.terms),
        ranks=distributed.world_size(),
    )
    if reason is not None:
        logger.info("the step is launched kernel by kernel, not replayed as a CUDA graph: %s", reason)
        return None
    return GraphedStep(
        sampler=sampler,
        step=step,
        objective=objective,
        optimizer=optimizer,
        update=update,
        recorder=CudaRecorder(device),
    )


def obstacle(*, compiled: bool, from_keys: bool, lasting: bool, ranks: int) -> str | None:
    """Why a step on a GPU cannot be recorded, if so."""
    if not compiled:
        return "it is not compiled"
    if not from_keys:
        return "its data are not drawn on the device"
    if lasting:
        return "adversaries that last are trained along, with optimisers of their own"
    if ranks > 1:
        return f"{ranks} ranks exchange messages in it"
    return None
