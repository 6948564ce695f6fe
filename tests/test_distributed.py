"""Ranks that each see a slice of the batch train exactly what one process would train on all of it."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from spd_hydra import distributed
from spd_hydra.build import assemble, untrained_target
from spd_hydra.config import RunConfig
from spd_hydra.optimizer import adamw
from spd_hydra.step import Ascent, Step

Toy = Callable[..., RunConfig]
State = dict[str, torch.Tensor]


def train(config: RunConfig, steps: int) -> tuple[State, list[State]]:
    """Weights after some steps, and what each step told of its loss."""
    parts = assemble(config, untrained_target(config), torch.device("cpu"))
    sampler, step = parts.train_sampler(), Step(parts.objective, compile=config.train.compile)
    optimizer = adamw([list(parts.model.component_parameters()), list(parts.model.ci_parameters())],
                      lr=1e-3, weight_decay=0.0)  # fmt: skip
    told = []
    adversary, ascent = parts.objective.adversary, Ascent(parts.objective, compile=config.train.compile)
    for number in range(steps):
        for left in range(adversary.extra_ascents, 0, -1):
            ascent([sampler(number)])
            adversary.ascend(left)
        loss = step(*sampler(number), parts.objective.scheduled(number / steps))
        optimizer.step()
        adversary.ascend()
        told.append({"total": loss.total, **loss.terms, **loss.l0})
    return parts.model.trainable_state() | adversary.state(), told


def of_a_rank(rank: int, size: int, port: int, config: RunConfig, steps: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with distributed.process_group(torch.device("cpu")):
        torch.save(train(config, steps), out / f"{rank}.pt")


def on_ranks(size: int, config: RunConfig, steps: int, out: Path) -> list[tuple[State, list[State]]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(of_a_rank, (size, port, config, steps, out), nprocs=size)  # type: ignore[attr-defined]
    return [torch.load(out / f"{rank}.pt") for rank in range(size)]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_train_what_one_process_trains(toy: Toy, tmp_path: Path, size: int, compiled: bool) -> None:
    steps = 100
    config = toy(
        "train.batch_size=64",  # no multiple of 3
        "loss.importance_minimality.beta=0.5",  # no mean over positions: needs the global frequency
        "loss.faithfulness.coeff=0.1",
        f"train.compile={str(compiled).lower()}",
    )
    weights, told = train(config, steps)
    for own_weights, own_told in on_ranks(size, config, steps, tmp_path):
        for name, value in weights.items():
            torch.testing.assert_close(own_weights[name], value, rtol=1e-5, atol=1e-5)
        for one, other in zip(told, own_told, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_ranks_have_one_adversary(toy: Toy, tmp_path: Path) -> None:
    config = toy(
        "train.batch_size=63",  # unequal shares
        "loss.pgd_recon.coeff=1",
        "loss.pgd_recon.n_steps=2",
        "loss.pgd_recon.step_size=0.4",
        "loss.pgd_recon_subset.coeff=1",
        "loss.pgd_recon_layerwise.coeff=1",
        "loss.pgd_recon_layerwise.scope=per_datapoint",
        "loss.persistent_pgd_recon.coeff=1",
        "loss.persistent_pgd_recon.ascents=2",
    )
    weights, told = train(config, 20)
    for own_weights, own_told in on_ranks(2, config, 20, tmp_path):
        assert own_weights.keys() == weights.keys()
        for name, value in weights.items():
            torch.testing.assert_close(own_weights[name], value, rtol=1e-4, atol=1e-4)
        for one, other in zip(told, own_told, strict=True):
            torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("number", [1, 5, 8, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_rows_of_all_ranks_are_the_batch(number: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    rows: list[range] = []
    for rank in range(size):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        rows.append(distributed.own_rows(number))
    assert [row for own in rows for row in own] == list(range(number))
    assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_small_tensors_go_together_and_large_ones_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_MESSAGE_BYTES", 16)
    tensors = [torch.zeros(number) for number in (1, 2, 1, 7, 1, 4)]  # of 4 bytes each
    messages = [[tensor.numel() for tensor in own] for own in distributed.messages_of(tensors)]
    assert messages == [[1, 2, 1], [7], [1], [4]]


def test_alone_a_sum_over_ranks_is_the_tensor_itself() -> None:
    one = torch.tensor([1.0, 2.0])
    assert distributed.global_sum([one])[0] is one
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
