"""The induction-head model and its sequences: what stands where, what the answer is, what is certified."""

import pytest
import torch
from torch import nn

from spd_hydra import rng
from spd_hydra.data.induction import Induction, InductionBatches
from spd_hydra.model.induction import InductionHeads, waves
from spd_hydra.model.obtain import obtain_target
from spd_hydra.model.tms import TMS
from spd_hydra.model.training import TargetTraining
from spd_hydra.section import ConfigError

SPEC = InductionHeads(n_tokens=9, length=8, d_model=4)
KEY = rng.key(0, "test")


def rows(number: int, first: int = 0) -> torch.Tensor:
    return torch.arange(first, first + number, dtype=torch.int32)


def batches() -> InductionBatches:
    return Induction().bind(SPEC)


def test_a_sequence_begins_with_its_token_and_holds_the_induction_token_twice() -> None:
    found = batches()(KEY, rows(5000))
    assert found.dtype == torch.int64
    assert (found[:, 0] == 9).all()
    assert (found[:, -1] == 10).all()
    assert ((found == 10).sum(dim=1) == 2).all()
    assert ((found == 9).sum(dim=1) == 1).all()


def test_first_places_and_ordinary_tokens_are_uniform() -> None:
    found = batches()(KEY, rows(20_000))
    places = (found[:, :-1] == 10).nonzero()[:, 1]
    counts = torch.bincount(places, minlength=8).double()
    assert counts[[0, 6, 7]].sum() == 0, "the answer stands between the two"
    wanted = 20_000 / 5
    assert ((counts[1:6] - wanted).abs() < 5 * wanted**0.5).all()
    ordinary = torch.bincount(found[found < 9], minlength=9).double()
    assert ((ordinary - ordinary.mean()).abs() < 5 * ordinary.mean() ** 0.5).all()


def test_a_slice_of_rows_is_the_slice_of_the_whole() -> None:
    whole = batches()(KEY, rows(20))
    assert torch.equal(batches()(KEY, rows(5, first=7)), whole[7:12])
    assert not torch.equal(batches()(rng.key(1, "test"), rows(20)), whole)


def test_the_answer_is_what_followed_the_first_induction_token() -> None:
    tokens = torch.tensor([[9, 10, 3, 1, 2, 5, 6, 10], [9, 4, 4, 0, 8, 10, 7, 10]])
    assert SPEC.answers(tokens).tolist() == [3, 7]


def by_hand(module: nn.Module, tokens: list[int], n_heads: int) -> torch.Tensor:
    """Logits of one sequence, written out with loops over places and heads."""
    d, T = module.embed.weight.shape[1], len(tokens)
    size = d // n_heads
    stream = [module.embed.weight[token] for token in tokens]
    for layer in module.layers:
        placed = [x + waves(T, d)[t] for t, x in enumerate(stream)]
        added = []
        for t in range(T):
            heads = []
            for h in range(n_heads):
                own = slice(h * size, (h + 1) * size)
                query = (layer.q_proj.weight @ placed[t])[own]
                keys = [(layer.k_proj.weight @ placed[s])[own] for s in range(t + 1)]
                weights = torch.stack([query @ key / size**0.5 for key in keys]).softmax(dim=0)
                values = [(layer.v_proj.weight @ stream[s])[own] for s in range(t + 1)]
                heads.append(sum(w * v for w, v in zip(weights, values, strict=True)))
            added.append(layer.o_proj.weight @ torch.cat(heads))
        stream = [x + y for x, y in zip(stream, added, strict=True)]
    return module.unembed.weight @ stream[-1]


@pytest.mark.parametrize("n_heads", [1, 2])
def test_the_logits_are_those_of_attention_written_out(n_heads: int) -> None:
    spec = InductionHeads(n_tokens=9, length=8, d_model=4, n_heads=n_heads)
    module = spec.build(rng.generator(0, "test"))
    tokens = spec.sequences(KEY, rows(2))
    wanted = torch.stack([by_hand(module, row.tolist(), n_heads) for row in tokens])
    torch.testing.assert_close(module(tokens), wanted, rtol=1e-5, atol=1e-5)


def test_the_positions_are_sines_and_cosines() -> None:
    found = waves(length=3, width=4)
    angles = [[0.0, 0.0], [1.0, 0.1], [2.0, 0.2]]
    wanted = torch.tensor([[*(torch.tensor(a).sin()), *(torch.tensor(a).cos())] for a in angles])
    torch.testing.assert_close(found, wanted)


def test_the_loss_of_even_logits_is_that_of_guessing() -> None:
    class Even(nn.Module):
        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(tokens), 11)

    loss = SPEC.training_loss(Even(), SPEC.sequences(KEY, rows(6)))
    torch.testing.assert_close(loss, torch.tensor(11.0).log())


def test_only_a_model_that_completes_sequences_is_certified() -> None:
    untrained = SPEC.build(rng.generator(0, "test"))
    (accuracy,) = SPEC.certify(untrained)
    assert accuracy.name == "accuracy"
    assert not accuracy.passed

    class Right(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(1, 1)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            found = torch.zeros(len(tokens), 11)
            for row, sequence in enumerate(tokens.tolist()):
                found[row, sequence[sequence.index(10) + 1]] = 1
            return found

    (accuracy,) = SPEC.certify(Right())
    assert accuracy.value == 1
    assert accuracy.passed


def test_sizes_are_known() -> None:
    assert (InductionHeads().vocab_size(), InductionHeads().context_length()) == (130, 64)


def test_other_targets_get_no_sequences() -> None:
    with pytest.raises(ConfigError) as caught:
        Induction().bind(TMS())
    assert str(caught.value) == (
        "data: induction cannot feed model/tms; choose model=induction_heads, or the data source made for "
        "this model"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 5}, "d_model: got 5, must be even"),
        ({"d_model": 4, "n_heads": 3}, "n_heads: got 3, must divide d_model (4)"),
    ],
)
def test_widths_that_cannot_be_shared_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        InductionHeads(**options)
    assert str(caught.value) == message


@pytest.mark.slow
def test_a_small_model_learns_to_complete_sequences() -> None:
    training = TargetTraining(steps=1500, batch_size=64, lr=1e-2, max_tries=2)
    spec = InductionHeads(n_tokens=12, length=12, d_model=16, training=training)
    target = obtain_target(spec, Induction().bind(spec), seed=0, device="cpu", cache_dir=None)
    assert target.certified
