"""Ranks that share out the optimiser's work train what ranks without it train, from the same checkpoints."""

import itertools
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from tests.ranks import free_port, play, result_in, rows_of
from torch import nn

from spd_hydra import distributed, load_run
from spd_hydra.build import assemble, untrained_target
from spd_hydra.checkpoint import load_checkpoint
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.logger.base import Logger
from spd_hydra.metric.evaluation import Evaluation
from spd_hydra.replicas import Alone
from spd_hydra.restarts import begin_with_best
from spd_hydra.run_dir import RunDirectory
from spd_hydra.section import ConfigError
from spd_hydra.trainer import Trainer

Toy = Callable[..., RunConfig]
Make = Callable[..., Trainer]
RANKS, STEPS, SAVED = 3, 30, 10
SHARED = "train.shard=optimizer"
# C = 7: most parameters have numbers of elements that are no multiples of the ranks.
WORDS = [
    "decomposition.sites={embed:{C:7},unembed:{C:7}}",
    "train.faithfulness_warmup.steps=5",
    f"train={{steps:{STEPS},checkpoint_every:{SAVED},keep_checkpoints:3,log_every:2,batch_size:64}}",
    "train.clip_components=0.05",
    "train.clip_ci_fn=0.02",
    "loss.importance_minimality.beta=0.5",  # no mean over positions
]
IN_PARTS = ["train.accumulate=3", "train.batch_size=62"]
CHOSEN = ["train.restarts={number:2,fraction:0.2}", "loss.persistent_pgd_recon={coeff:1,ascents:2}"]


class Job(NamedTuple):
    """A training, from its start or from the checkpoint of another."""

    name: str
    config: RunConfig
    start: str | None = None


def fit(job: Job, out: Path) -> dict[str, int]:
    """Train on all ranks into `out/<name>`; how many bytes this rank then holds, by what they are."""
    parts = assemble(job.config, untrained_target(job.config), torch.device("cpu"))
    path = out / job.name
    if distributed.rank() == 0:
        directory = RunDirectory.at(path)
        distributed.of_rank_0(directory.token)
    else:
        directory = RunDirectory.follow(path, distributed.of_rank_0())
    nothing = Evaluation(step=0, n_positions=1, ci_threshold=0.1, metrics={"loss/total": 0.0}, sites={})
    with directory:
        trainer = Trainer(
            parts.objective,
            training=job.config.train,
            evaluation=job.config.eval,
            sampler=parts.train_sampler(),
            evaluate=lambda step: nothing,
            on_figures=lambda evaluation: None,
            run=directory,
            tracker=Logger(),
        )
        if job.start is None:
            begin_with_best(Alone(trainer), [parts.initial_state])
        else:
            trainer.restore(load_checkpoint(out / job.start / "checkpoints" / f"step_{SAVED}"))
        trainer.fit()
    parameters = trainer.updates.components + trainer.updates.ci_fn
    states = [state for own in trainer.updates.optimizer.state.values() for state in own.values()]
    updated = [p for group in trainer.updates.optimizer.param_groups for p in group["params"]]
    return {
        "parameters": bytes_behind(parameters),
        "moments": bytes_behind([state for state in states if state.dim()]),
        "gradients": bytes_behind([p.grad for p in [*updated, *parameters] if p.grad is not None]),
    }


def bytes_behind(tensors: list[Any]) -> int:
    """Size of the memory of tensors, each piece of memory once and whole."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in local}
    return sum(storage.nbytes() for storage in storages.values())


def of_a_rank(rank: int, size: int, port: int, jobs: list[Job], out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    distributed._MESSAGE_BYTES = 512  # of so few numbers one message would do
    with distributed.process_group(torch.device("cpu")):
        for job in jobs:
            (out / f"{job.name}_{rank}.json").write_text(json.dumps(fit(job, out)))


def on_ranks(size: int, jobs: list[Job], out: Path) -> None:
    mp.spawn(of_a_rank, (size, free_port(), jobs, out), nprocs=size)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `RANKS` processes have trained, with and without sharing, by name."""

    def made(*words: str) -> RunConfig:
        return compose(["debug=smoke", *WORDS, *words])

    out = tmp_path_factory.mktemp("done")
    jobs = [
        Job("whole", made()),
        Job("shared", made(SHARED)),
        Job("whole in parts", made(*IN_PARTS)),
        Job("shared in parts", made(*IN_PARTS, SHARED)),
        Job("whole, chosen", made(*CHOSEN)),
        Job("shared, chosen", made(*CHOSEN, SHARED)),
        Job("shared, gone on with", made(SHARED), start="shared"),
        Job("shared, then whole", made(), start="shared"),
        Job("whole, then shared", made(SHARED), start="whole"),
    ]
    on_ranks(RANKS, jobs, out)
    return out


def files_at_the_end(path: Path) -> list[dict[str, torch.Tensor]]:
    folder = path / "checkpoints" / f"step_{STEPS}"
    return [load_file(folder / f"{name}.safetensors") for name in ("model", "optimizer")]


def require_same_results(found: Path, expected: Path) -> None:
    for one, other in zip(files_at_the_end(found), files_at_the_end(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    last = itertools.islice(reversed(rows_of(found)), 10)  # one that began from a checkpoint has no others
    for row, expected_row in zip(last, reversed(rows_of(expected)), strict=False):
        assert row.pop("split") == expected_row.pop("split")
        assert row == pytest.approx(expected_row, rel=1e-5, abs=1e-5)


# ---- the same numbers ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", " in parts", ", chosen"])
def test_shared_out_over_ranks_training_is_the_same(done: Path, how: str) -> None:
    require_same_results(done / f"shared{how}", done / f"whole{how}")


@pytest.mark.slow
def test_a_compiled_step_is_shared_out_too(tmp_path: Path) -> None:
    words = ["debug=smoke", *WORDS, "train.log_every=1", "train.clip_ci_fn=null"]
    whole, shared = compose(words), compose([*words, "train.compile=true", SHARED])
    on_ranks(2, [Job("whole", whole), Job("shared", shared)], tmp_path)
    require_same_results(tmp_path / "shared", tmp_path / "whole")


# ---- the same checkpoints ------------------------------------------------------------------------------


@pytest.mark.slow
def test_gone_on_with_from_a_checkpoint_it_ends_with_the_same_bits(done: Path) -> None:
    found, expected = files_at_the_end(done / "shared, gone on with"), files_at_the_end(done / "shared")
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["shared, then whole", "whole, then shared"])
def test_sharing_may_begin_and_end_at_a_checkpoint(done: Path, way: str) -> None:
    require_same_results(done / way, done / "whole")


@pytest.mark.slow
def test_one_process_goes_on_with_what_ranks_shared(done: Path) -> None:
    config = compose(["debug=smoke", *WORDS, SHARED])
    fit(Job("alone", config, start="shared"), done)
    require_same_results(done / "alone", done / "whole")


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path, target_cache: Path) -> None:
    cadence = ["train.steps=12", "train.checkpoint_every=3", "train.log_every=2", "eval.every=4"]
    words = ["debug=smoke", f"cache_dir={target_cache}", "model.training.batch_size=64", *cadence, SHARED]
    moments = [{"signal": signal.SIGKILL, "rank": 1, "steps": 5}]
    played = play(tmp_path, words, {"undisturbed": [], "killed": moments})
    assert -signal.SIGKILL in played["killed"][0]["codes"]
    assert result_in(tmp_path / "runs" / "killed") == result_in(tmp_path / "runs" / "undisturbed")
    (path,) = (tmp_path / "runs" / "killed").glob("*/*/config.yaml")
    opened = load_run(path.parent)
    saved = load_file(path.parent / "checkpoints" / "step_12" / "model.safetensors")
    assert opened.model.trainable_state().keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in opened.model.trainable_state().items())


# ---- less memory ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["", " in parts", ", then whole"])
def test_a_rank_holds_its_part_of_moments_and_gradients_alone(done: Path, how: str) -> None:
    ranks = [json.loads((done / f"shared{how}_{rank}.json").read_text()) for rank in range(RANKS)]
    # V [5, 7] and U [7, 2], tied; at both sites 7 private MLPs of 16 hidden units.
    whole = 4 * (7 * (5 + 2) + 2 * 7 * (3 * 16 + 1))
    assert [rank["parameters"] for rank in ranks] == [whole] * RANKS
    if how == ", then whole":
        assert [(rank["moments"], rank["gradients"]) for rank in ranks] == [(2 * whole, whole)] * RANKS
        return
    assert sum(rank["moments"] for rank in ranks) == 2 * whole
    rounding = 4 * 10 * (RANKS - 1)  # of each of 10 tensors the last rank has so many numbers fewer
    for rank in ranks:
        assert rank["moments"] == pytest.approx(2 * whole / RANKS, abs=2 * rounding)
        assert rank["gradients"] == pytest.approx(whole / RANKS, abs=rounding)


# ---- few messages --------------------------------------------------------------------------------------


def values_of(rank: int, index: int) -> torch.Tensor:
    """Whole numbers, whose sums are exact; of one number, of fewer than there are ranks, of many."""
    return torch.arange(1 + index % 5 * 3) * (index + 2.0) - 7 * rank


def of_an_exchange(rank: int, size: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with distributed.process_group(torch.device("cpu")):
        from spd_hydra.shards import Shards

        group: Any = torch.distributed.group.WORLD
        found = {}
        for number in (3, 40):
            own = [nn.Parameter(torch.zeros_like(values_of(0, index))) for index in range(number)]
            alone = nn.Parameter(torch.zeros(2))
            shards = Shards(own)
            pieces = shards.of(own)
            marks = [group._get_sequence_number_for_group()]
            gradients = iter(
                [torch.tensor([rank, 1.0]), *(values_of(rank, index) for index in range(number))]
            )
            whole, *sums = shards.sums([alone, *own], gradients)
            marks.append(group._get_sequence_number_for_group())
            with torch.no_grad():
                for piece, summed in zip(pieces, sums, strict=True):
                    piece.add_(summed)
            shards.gather(own)
            marks.append(group._get_sequence_number_for_group())
            found[number] = {
                "messages": [after - before for before, after in itertools.pairwise(marks)],
                "not shared": whole.tolist(),
                "pieces": [summed.to_local().numel() for summed in sums],  # type: ignore[attr-defined]
                "updated": [parameter.tolist() for parameter in own],
            }
        (out / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_however_many_parameters_there_are_as_many_messages_bring_their_sums(tmp_path: Path) -> None:
    mp.spawn(of_an_exchange, (RANKS, free_port(), tmp_path), nprocs=RANKS)  # type: ignore[attr-defined]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    for number in (3, 40):
        sums = [
            torch.stack([values_of(rank, index) for rank in range(RANKS)]).sum(0) for index in range(number)
        ]
        for found in (rank[str(number)] for rank in ranks):
            assert found["messages"] == [2, 1]  # one for what is not shared
            assert found["not shared"] == [sum(range(RANKS)), RANKS]
            assert found["updated"] == [own.tolist() for own in sums]
        widths = [[len(part) for part in own.chunk(RANKS)] for own in sums]
        assert [rank[str(number)]["pieces"] for rank in ranks] == [
            [(own + [0] * RANKS)[place] for own in widths] for place in range(RANKS)
        ]


# ---- where there is nothing to share, or it cannot be --------------------------------------------------


def test_alone_sharing_changes_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    plain, shared = make(), make(SHARED)
    assert "train.shard=optimizer has no effect: there is one process" in caplog.text
    for trainer in (plain, shared):
        trainer.updates.fit_weights()
        trainer.train_step()
    for name, value in plain.model.trainable_state().items():
        assert torch.equal(shared.model.trainable_state()[name], value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([SHARED, "train.replicas=3"], "train.shard: got optimizer with train.replicas=3, must be none"),
        (["train.shard=moments"], r"train.shard.*moments.*none.*optimizer"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(["experiment=tms_5-2", *words])
