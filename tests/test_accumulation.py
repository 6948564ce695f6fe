"""A step taken in parts is the step on the whole batch, for every kind of term, and on several ranks."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor, nn

from spd_hydra import distributed
from spd_hydra.accumulation import AccumulatedStep
from spd_hydra.build import assemble, untrained_target
from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.data.base import Batches
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.faithfulness import Faithfulness
from spd_hydra.loss.importance_minimality import ImportanceMinimality
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective, StepLoss
from spd_hydra.loss.pgd_recon import PGDRecon
from spd_hydra.loss.recon import Recon
from spd_hydra.precision import Precision
from spd_hydra.sampler import Sampler, SplitSampler
from spd_hydra.search import Search
from spd_hydra.section import ConfigError
from spd_hydra.step import Step
from spd_hydra.trainer import Trainer

Toy = Callable[..., RunConfig]
Make = Callable[..., Trainer]
Told = dict[str, Tensor]
LENGTH = 4
BETA = "loss.importance_minimality.beta=0.5"  # no mean over positions


class Tokens(Batches):
    """Rows of very unequal numbers of tokens."""

    padded = True

    def __call__(self, key: Tensor, rows: Tensor) -> Tensor:
        places = torch.arange(LENGTH, dtype=torch.int32)
        tokens = (7 * rows[:, None] + 3 * places) % 5
        return tokens.where(places <= rows[:, None] * rows[:, None] % LENGTH, -1).long()


class StreamedTokens(Tokens):
    """The same rows as places of a stream that is read once."""

    ordered = True

    def __init__(self) -> None:
        self.read = 0

    def __call__(self, key: Tensor, rows: Tensor) -> Tensor:
        assert rows.min() >= self.read, "what was read is gone"
        self.read = int(rows.max()) + 1
        return super().__call__(key, rows)


class FirstRowsEmpty(Tokens):
    """The same, but for the first two rows of a batch, which are nothing but padding."""

    def __call__(self, key: Tensor, rows: Tensor) -> Tensor:
        return super().__call__(key, rows).masked_fill(rows[:, None] < 2, -1)


class OfTokens(nn.Module):
    """Logits of each token, or of the mean over a row; padding is read as token 0."""

    def __init__(self, *, pools: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed, self.unembed, self.pools = nn.Embedding(5, 3), nn.Linear(3, 5), pools
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.unembed(torch.relu(self.embed(tokens.clamp(min=0))))
        return logits.mean(1) if self.pools else logits


def language_model(
    *, pools: bool, beta: float, rows: int, searches: bool = False, batches: Batches | None = None
) -> tuple[Objective, Sampler]:
    sites = {name: SitePattern(pattern=name, C=4) for name in ("embed", "unembed")}
    model = DecomposedModel(
        OfTokens(pools=pools), Decomposition(sites=sites), MLPCausalImportance(hidden=4), seed=0
    )
    losses = LossSet(
        divergence=Divergence.kl,
        faithfulness=Faithfulness(coeff=0.1),
        stochastic_recon_layerwise=Recon(coeff=1.0, routing=LossSet().stochastic_recon_layerwise.routing),
        pgd_recon=PGDRecon(coeff=float(searches), n_steps=2, step_size=0.4),
        importance_minimality=ImportanceMinimality(
            coeff=1.0, beta=beta, p_start=2.0, p_end=0.5, squeeze=3.0, squeeze_from=0.2, squeeze_to=0.4
        ),
    )
    objective = Objective(model, losses, precision=Precision.fp32, ci_threshold=0.1, padded=True)
    sampler = Sampler(
        batches or Tokens(),
        seed=0,
        purpose="train",
        rows=torch.arange(rows, dtype=torch.int32),
        rows_per_step=rows,
        columns=objective.columns(losses.active_terms()),
        position_shape=(LENGTH,),
    )
    return objective, sampler


def told(loss: StepLoss, objective: Objective) -> Told:
    """Everything that a step gives."""
    model = objective.model
    trained = [*model.named_parameters(), *objective.adversary.named_parameters()]
    gradients = {f"grad {name}": p.grad for name, p in trained if p.grad is not None}
    return {"total": loss.total, **loss.terms, **{f"l0 {site}": n for site, n in loss.l0.items()}} | gradients


def whole_and_parts(
    objective: Objective, sampler: Sampler, parts: int, *, compile: bool = False
) -> tuple[Told, Told]:
    schedule = objective.scheduled(0.3)
    whole = told(Step(objective, compile=False)(*sampler(2), schedule), objective)
    step = AccumulatedStep(objective, SplitSampler(sampler, parts), compile=compile)
    step(1, schedule)  # what it keeps of one step must not change the next
    return whole, told(step(2, schedule), objective)


def require_close(parts: Told, whole: Told) -> None:
    assert parts.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-5, atol=1e-6, msg=f"{name} differs")


# ---- the whole batch -----------------------------------------------------------------------------------


ADVERSARIES = [
    "loss.pgd_recon={coeff:1.0,scope:per_datapoint}",
    "loss.persistent_pgd_recon={coeff:0.5}",
    "loss.hidden_acts_recon={coeff:0.5}",
    "loss.smooth_l0={coeff:0.1,frequency_coeff:0.5,frequency_scale:30.0}",
]
SEARCH = "coeff:1.0,scope:shared,n_steps:3,step_size:0.3"
SEARCHES = [
    f"loss.pgd_recon={{{SEARCH}}}",
    f"loss.pgd_recon_layerwise={{{SEARCH}}}",
    f"loss.pgd_recon_subset={{{SEARCH}}}",
]


@pytest.mark.parametrize(
    "overrides", [[], [BETA], [BETA, "loss.stochastic_recon_subset.coeff=1"], ADVERSARIES, SEARCHES]
)
@pytest.mark.parametrize("parts", [2, 9])
def test_parts_have_the_loss_and_the_gradients_of_the_whole_batch(
    toy: Toy, parts: int, overrides: list[str]
) -> None:
    words = ["train.batch_size=21", "loss.faithfulness.coeff=0.1", *overrides]
    made = assemble(config := toy(*words), untrained_target(config), torch.device("cpu"))
    whole, cut = whole_and_parts(made.objective, made.train_sampler(), parts)
    require_close(cut, whole)


@pytest.mark.parametrize("beta", [0.0, 0.5])
@pytest.mark.parametrize("pools", [False, True])
def test_padding_is_spread_unevenly_over_parts_and_changes_nothing(pools: bool, beta: float) -> None:
    objective, sampler = language_model(pools=pools, beta=beta, rows=7)
    whole, cut = whole_and_parts(objective, sampler, 3)
    require_close(cut, whole)


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_a_part_that_is_nothing_but_padding_changes_nothing(beta: float) -> None:
    objective, sampler = language_model(pools=False, beta=beta, rows=7, batches=FirstRowsEmpty())
    whole, cut = whole_and_parts(objective, sampler, 7)
    assert all(value.isfinite().all() for value in whole.values())
    require_close(cut, whole)


class Empty(Tokens):
    """Padding alone."""

    def __call__(self, key: Tensor, rows: Tensor) -> Tensor:
        return torch.full((len(rows), LENGTH), -1)


def test_a_batch_that_is_nothing_but_padding_has_the_gradients_of_the_whole_batch() -> None:
    objective, sampler = language_model(pools=False, beta=0.0, rows=6, batches=Empty())
    whole, cut = whole_and_parts(objective, sampler, 3)
    assert all(value.isfinite().all() for value in whole.values())
    require_close(cut, whole)


def test_an_adversary_searches_the_whole_batch_also_for_an_output_that_is_no_mean_over_positions() -> None:
    objective, sampler = language_model(pools=True, beta=0.0, rows=7, searches=True)
    whole, cut = whole_and_parts(objective, sampler, 3)
    require_close(cut, whole)


def test_a_stream_is_read_once_however_often_a_step_looks_at_its_parts() -> None:
    def streamed() -> tuple[Objective, Sampler]:
        return language_model(pools=True, beta=0.5, rows=7, searches=True, batches=StreamedTokens())

    (objective, sampler), (_, in_parts) = streamed(), streamed()
    step = AccumulatedStep(objective, SplitSampler(in_parts, 3), compile=False)
    for number in range(3):
        schedule = objective.scheduled(0.1 * number)
        whole = told(Step(objective, compile=False)(*sampler(number), schedule), objective)
        require_close(told(step(number, schedule), objective), whole)


def test_what_a_search_finds_in_a_part_alone_would_be_something_else(toy: Toy) -> None:
    config = toy("train.batch_size=21", f"loss.pgd_recon={{{SEARCH}}}")
    made = assemble(config, untrained_target(config), torch.device("cpu"))
    split = SplitSampler(made.train_sampler(), 3)
    parts = [split(2, part) for part in range(3)]
    search = Search(made.objective, compile=False)
    together = search(lambda: parts)["pgd_recon"]
    alone = search(lambda: parts[:1])["pgd_recon"]
    assert any(not torch.equal(together[site], alone[site]) for site in together)


@pytest.mark.slow
def test_compiled_parts_have_the_gradients_of_the_whole_batch(toy: Toy) -> None:
    config = toy(
        "train.batch_size=21",
        "loss.importance_minimality={beta:0.5,p_start:2.0,p_end:1.0,squeeze:3.0,squeeze_from:0.2}",
        *SEARCHES[1:],
    )
    made = assemble(config, untrained_target(config), torch.device("cpu"))
    whole, cut = whole_and_parts(made.objective, made.train_sampler(), 2, compile=True)
    require_close(cut, whole)


def test_a_part_draws_its_slice_of_the_whole(toy: Toy) -> None:
    made = assemble(config := toy("train.batch_size=7"), untrained_target(config), torch.device("cpu"))
    sampler = made.train_sampler()
    split = SplitSampler(sampler, 3)
    drawn = [split(5, part) for part in range(3)]
    assert [len(batch) for batch, _ in drawn] == [3, 2, 2]
    for whole, parts in zip(sampler(5), zip(*drawn, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(
    "words", [[BETA], ["loss.persistent_pgd_recon={coeff:0.5,ascents:3,n_sources:2}", *SEARCHES[:1]]]
)
def test_a_run_in_parts_trains_what_a_run_on_whole_batches_trains(make: Make, words: list[str]) -> None:
    whole, parts = make(*words), make(*words, "train.accumulate=3")
    for trainer in (whole, parts):
        for _ in range(4):
            trainer.train_step()
    for name, value in whole.model.trainable_state().items():
        torch.testing.assert_close(parts.model.trainable_state()[name], value, rtol=1e-4, atol=1e-5)
    for name, value in whole.adversary.state().items():
        torch.testing.assert_close(parts.adversary.state()[name], value, rtol=1e-4, atol=1e-5)


def test_only_terms_that_are_no_means_need_a_pass_before(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    passes: dict[float, int] = {}
    for beta in (0.0, 0.5):
        config = toy("train.batch_size=8", f"loss.importance_minimality.beta={beta}")
        made = assemble(config, untrained_target(config), torch.device("cpu"))
        step = AccumulatedStep(made.objective, SplitSampler(made.train_sampler(), 2), compile=False)
        step(0, {})
        seen: list[int] = []
        clean_pass = made.model.clean_pass
        monkeypatch.setattr(
            made.model, "clean_pass", lambda batch, run=clean_pass, seen=seen: (seen.append(1), run(batch))[1]
        )
        step(1, {})
        passes[beta] = len(seen)
    assert passes == {0.0: 2, 0.5: 4}


# ---- ranks ---------------------------------------------------------------------------------------------


def of_a_rank(rank: int, size: int, port: int, config: RunConfig, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with distributed.process_group(torch.device("cpu")):
        made = assemble(config, untrained_target(config), torch.device("cpu"))
        step = AccumulatedStep(made.objective, SplitSampler(made.train_sampler(), 2), compile=False)
        torch.save(told(step(0, made.objective.scheduled(0.3)), made.objective), out / f"{rank}.pt")


@pytest.mark.slow
def test_two_ranks_in_parts_have_the_gradients_of_the_whole_batch(toy: Toy, tmp_path: Path) -> None:
    config = toy(
        "train.batch_size=13",
        "loss.importance_minimality={beta:0.5,p_start:2.0,p_end:1.0,squeeze:3.0,squeeze_from:0.2}",
        *SEARCHES,
    )
    made = assemble(config, untrained_target(config), torch.device("cpu"))
    whole = told(
        Step(made.objective, compile=False)(*made.train_sampler()(0), made.objective.scheduled(0.3)),
        made.objective,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(of_a_rank, (2, port, config, tmp_path), nprocs=2)  # type: ignore[attr-defined]
    for rank in range(2):
        require_close(torch.load(tmp_path / f"{rank}.pt"), whole)


# ---- what cannot be ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.batch_size=4", "train.accumulate=5"], "accumulate: got 5, must be ≤ batch_size, which is 4"),
        (["train.accumulate=2", "train.replicas=3"], "accumulate: got 2 with train.replicas=3, must be 1"),
        (
            ["train.checkpoint_activations=true", "train.replicas=3"],
            "checkpoint_activations: got true with train.replicas=3, must be false",
        ),
        (["train.accumulate=0"], "train.accumulate: got 0, must be ≥ 1"),
    ],
)
def test_what_cannot_be_taken_in_parts_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(["experiment=tms_5-2", *words])


def test_every_part_of_every_rank_must_have_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match=r"train.accumulate: got 3 with train.batch_size=8 on 4 ranks.*≤ 2"):
        compose(["experiment=tms_5-2", "train.batch_size=8", "train.accumulate=3"])
