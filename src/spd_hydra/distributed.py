"""Several processes that train one decomposition, each on its rows of the global batch.

Each rank computes the additive statistics of the loss on its rows. Their sum over ranks gives the loss of
the global batch, also for terms that are no mean over positions, and the sum of the ranks' gradients is the
gradient of that loss.

Messages between ranks that are no tensors of a step go through a group of their own, on the CPU: they never
wait for a GPU, and may take as long as rank 0 needs to train a target. They are numbers and JSON.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from spd_hydra import terminal
from spd_hydra.section import ConfigError

AnyTensor = TypeVar("AnyTensor", bound=Tensor)

_PLACE = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # beside WORLD_SIZE, what torchrun tells each process
_STEP_TIMEOUT = timedelta(minutes=30)  # rank 0 saves and evaluates while the others wait in their next step
_MESSAGE_TIMEOUT = timedelta(days=30)
_MESSAGE_BYTES = 2**25  # at most, of several tensors that are sent as one
_LEAVE_SECONDS = 5.0
_POLL_SECONDS = 0.02

_messages: "dist.ProcessGroup | None" = None
_stores: dict[tuple[str, ...], Store] = {}
_meetings = 0
_connections: dict[str, int] = {}


def rank() -> int:
    """Number of this process, from 0; 0 also where there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def started_with() -> int:
    """Number of processes that were started to train together, before they have met and after they parted."""
    given = os.environ.get("WORLD_SIZE", "")
    return int(given) if given.isdecimal() else 1


def require_place() -> None:
    """Refuse an environment that says half of where this process stands among several.

    Raises:
        ConfigError: names what is there and what is missing.
    """
    given, of_srun = os.environ.get("WORLD_SIZE", ""), os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if not given and of_srun.isdecimal() and int(of_srun) > 1:
        raise ConfigError(
            f"srun: started {of_srun} times, and each would train the whole run for itself; start one "
            f"(srun --ntasks=1) with launcher.ranks_per_node={of_srun} for processes that share the run, or "
            "let launcher=slurm start them; if each is to be a run of its own, set WORLD_SIZE=1"
        )
    if not given or given == "1":
        return
    missing = [name for name in _PLACE if not os.environ.get(name)]
    wrong = f"without {', '.join(missing)}" if missing else "which is no number of processes"
    if missing or not given.isdecimal() or given == "0":
        raise ConfigError(
            f"WORLD_SIZE: got {given} in the environment, {wrong}; to run alone, unset it; several processes "
            f"are started by launcher.ranks_per_node={given if given.isdecimal() else 2}, or by torchrun"
        )


def leads() -> bool:
    """Whether this process is rank 0, or alone: it alone writes, prints and tracks."""
    return started_with() == 1 or int(os.environ.get("RANK", "0")) == 0


def say(text: str) -> None:
    """Print something once, however many ranks there are."""
    if leads():
        terminal.show(text)


def device_index() -> int:
    """Which of the visible GPUs is this rank's: its own where several are visible, else the only one."""
    return int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.device_count() > 1 else 0


def set_threads(number: int) -> None:
    """Use so many CPU threads; 0: the machine's, divided among the ranks on this machine.

    Where the environment says how many (OMP_NUM_THREADS, SLURM_CPUS_PER_TASK), that is the number of a rank.
    """
    if number:
        torch.set_num_threads(number)
        return
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if started_with() == 1 or ranks == 1 or "OMP_NUM_THREADS" in os.environ:
        return
    if os.environ.get("SLURM_NTASKS") == os.environ["WORLD_SIZE"] and "SLURM_CPUS_PER_TASK" in os.environ:
        torch.set_num_threads(int(os.environ["SLURM_CPUS_PER_TASK"]))
    else:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Within the `with` block this process is one of `WORLD_SIZE` (environment), if that is above 1.

    The environment is that of `torchrun`: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Tensors on a GPU travel
    by nccl, others by gloo.

    Raises:
        ConfigError: the environment says only a part of that.
    """
    global _messages
    require_place()
    if started_with() == 1 or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device_index())
    store = _meeting_place()
    before = _sockets()
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=started_with(),
        timeout=_STEP_TIMEOUT,
    )
    try:
        _messages = dist.new_group(backend="gloo", timeout=_MESSAGE_TIMEOUT)
        _connections.clear()
        _connections.update({name: own for name, own in _sockets().items() if name not in before})
        yield
    finally:
        leave()


def _meeting_place() -> Store:
    """Where ranks find each other; one per process, with a part of its own for each meeting."""
    global _meetings
    place = tuple(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK"))
    if place not in _stores:
        _stores.clear()
        _stores[place], _, _ = next(iter(rendezvous("env://", timeout=_STEP_TIMEOUT)))
        _meetings = 0
    _meetings += 1
    return PrefixStore(f"meeting_{_meetings}", _stores[place])


def notes() -> Store:
    """Where a rank leaves notes for the others that can be read after it has left."""
    assert _stores, "ranks have met before they leave notes"
    return PrefixStore(f"notes_{_meetings}", next(iter(_stores.values())))


def leave(*, abruptly: bool = False) -> None:
    """End this rank's part in the group.

    Args:
        abruptly: in the middle of something; whoever waits for this rank then gets an error at once.
    """
    global _messages
    if not dist.is_initialized():
        return
    groups, _messages = [_messages, dist.group.WORLD], None
    if not abruptly:
        dist.destroy_process_group()
        return
    # torch closes connections with the last reference to a group, and holds some that nobody can drop.
    now = _sockets()
    for name, descriptor in _connections.items():
        if now.get(name) == descriptor:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.getpeername()  # fails where it only listens; torch does not bear the end of that
                connection.shutdown(socket.SHUT_RDWR)
    # In a thread, because a kernel that waits for a dead rank may hold it up.
    thread = threading.Thread(target=_abort, args=(groups,), daemon=True)
    thread.start()
    thread.join(_LEAVE_SECONDS)


def _abort(groups: "list[dist.ProcessGroup | None]") -> None:
    for group in groups:
        with contextlib.suppress(RuntimeError):
            if group is not None:
                group.abort()
    with contextlib.suppress(RuntimeError, AssertionError, ValueError):
        dist.destroy_process_group()


def _sockets() -> dict[str, int]:
    """Descriptors of this process's sockets by the name that the system gives each."""
    found: dict[str, int] = {}
    for path in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            if (name := str(path.readlink())).startswith("socket:"):
                found[name] = int(path.name)
    return found


def of_rank_0(value: Any = None) -> Any:
    """What rank 0 gives, on every rank; the others wait for it, however long that takes.

    Args:
        value: numbers, strings, booleans, None, and lists and string-keyed dictionaries of them.
    """
    if world_size() == 1:
        return value
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = torch.tensor([data.numel()])
    _wait(dist.broadcast(length, 0, group=_messages, async_op=True))
    if rank() != 0:
        data = torch.empty(int(length), dtype=torch.uint8)
    _wait(dist.broadcast(data, 0, group=_messages, async_op=True))
    return json.loads(data.numpy().tobytes())


def _wait(work: Any) -> None:
    """Wait, but let signals be heard, which a wait inside torch does not."""
    while not work.is_completed():
        time.sleep(_POLL_SECONDS)
    work.wait()


def largest(numbers: Sequence[int]) -> list[int]:
    """Each number's largest value over ranks. On the CPU: no GPU is waited for."""
    message = torch.tensor(list(numbers))
    if world_size() > 1:
        dist.all_reduce(message, dist.ReduceOp.MAX, group=_messages)
    return [int(number) for number in message]


def take_from_rank_0(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors, of the same shapes on every rank, with those of rank 0."""
    if world_size() == 1:
        return
    for kind in dict.fromkeys((tensor.dtype, tensor.device) for tensor in tensors):
        for own in messages_of([t.detach() for t in tensors if (t.dtype, t.device) == kind]):
            flat = torch.cat([tensor.reshape(-1) for tensor in own])
            dist.broadcast(flat, 0)
            for tensor, part in zip(own, torch.split(flat, [tensor.numel() for tensor in own]), strict=True):
                tensor.copy_(part.view(tensor.shape))


def messages_of(tensors: Iterable[AnyTensor]) -> Iterator[list[AnyTensor]]:
    """Tensors that go together: many small ones, but not so many that their copy would take much memory."""
    together: list[AnyTensor] = []
    for tensor in tensors:
        if together and sum(t.nbytes for t in together) + tensor.nbytes > _MESSAGE_BYTES:
            yield together
            together = []
        together.append(tensor)
    if together:
        yield together


def exact_sum(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor summed over ranks in double precision, for counts; no gradient passes."""
    return _reduced(tensors, dist.ReduceOp.SUM)


def side_by_side(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, of one shape, along their first axis, in the order of ranks."""
    if world_size() == 1:
        return tensor
    places = tensor.new_zeros(world_size(), *tensor.shape)
    places[rank()] = tensor
    (found,) = exact_sum([places])
    return found.flatten(0, 1)


def elementwise_largest(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each element's largest value over ranks; no gradient passes."""
    return _reduced(tensors, dist.ReduceOp.MAX)


def _reduced(tensors: Sequence[Tensor], operation: Any) -> list[Tensor]:
    if world_size() == 1:
        return list(tensors)
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    dist.all_reduce(flat, operation)
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


def own_rows(number: int) -> range:
    """The rows of a global batch of `number` rows that this rank works on: a contiguous share.

    The first `number % world_size()` ranks have one row more than the others.
    """
    each, left = divmod(number, world_size())
    first = rank() * each + min(rank(), left)
    return range(first, first + each + (rank() < left))


def global_sum(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Each tensor summed over ranks, small ones together; the gradient passes to this rank's share as it is.

    Args:
        tensors: float32, the same shapes on every rank; they are taken as they are sent.
    """
    if world_size() == 1:
        return list(tensors)
    return [summed for together in messages_of(tensors) for summed in _sum_of_one_message(together)]


def _sum_of_one_message(tensors: Sequence[Tensor]) -> list[Tensor]:
    flat: Tensor = _GlobalSum.apply(torch.cat([tensor.reshape(-1) for tensor in tensors]))  # type: ignore[no-untyped-call]
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


class _GlobalSum(torch.autograd.Function):
    """With L = f(Σ_r s_r) computed alike on every rank, ∂L/∂s_r = f' on each of them."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        # The functional form, which a tracer records like any other operation.
        import torch.distributed._functional_collectives as collectives  # noqa: PLC0415

        group = dist.group.WORLD
        assert group is not None, "there is a group where the world has more than one"
        summed: Tensor = collectives.wait_tensor(collectives.all_reduce(tensor, "sum", group))  # type: ignore[no-untyped-call]
        return summed

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
