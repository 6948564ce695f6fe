"""Contexts and tokens of subcomponents, against sorting everything there is."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from spd_hydra import distributed
from spd_hydra.metric.evaluation import SiteEvaluation
from spd_hydra.metric.text import AFTER, BEFORE, TokenResponses, TopContexts, _without_repeats, look

NAMES = {token: f"t{token}" for token in range(100)}


def random_batches(number: int = 3, rows: int = 4, length: int = 20, n: int = 5) -> list[Any]:
    """z, g = clamp(z), tokens with padding at the ends of rows."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(number):
        z = torch.randn(rows, length, n, generator=generator)
        tokens = torch.randint(0, 100, (rows, length), generator=generator)
        tokens[1, -6:] = -1
        found.append((z, z.clamp(0, 1), tokens))
    return found


@pytest.mark.parametrize("k", [1, 8, 1000])
def test_top_contexts_are_those_of_sorting_every_position(k: int) -> None:
    batches, best = random_batches(), TopContexts(k)
    for batch in batches:
        best.add(*batch)
    for n in range(5):
        places = [
            (float(z[row, at, n]), ci[row, :, n].tolist(), tokens[row].tolist(), at)
            for z, ci, tokens in batches
            for row in range(len(tokens))
            for at in range(tokens.shape[1])
            if tokens[row, at] >= 0 and ci[row, at, n] > 0
        ]
        expected = []
        for _, ci, tokens, at in sorted(places, key=lambda place: -place[0])[:k]:
            window = [i for i in range(max(at - BEFORE, 0), min(at + AFTER + 1, 20)) if tokens[i] >= 0]
            expected.append(
                ([f"t{tokens[i]}" for i in window], [round(ci[i], 4) for i in window], window.index(at))
            )
        found = [(one.tokens, one.ci, one.at) for one in best.contexts(n, NAMES)]
        assert found == expected


def test_no_more_than_k_positions_are_held() -> None:
    best = TopContexts(3)
    for batch in random_batches(number=6):
        best.add(*batch)
        assert best.z is not None
        assert best.z.shape == (3, 5)
        assert best.tokens.shape == best.ci.shape == (3, 5, BEFORE + 1 + AFTER)


def test_strongest_tokens_are_those_of_largest_mean_and_then_count() -> None:
    tokens = torch.tensor([[3, 7, 3, 9], [7, 3, 9, -1]])
    ci = torch.tensor([[[1.0], [0.5], [0.5], [0.75]], [[0.5], [0.75], [0.75], [1.0]]])
    responses = TokenResponses(torch.tensor([3, 7, 9, 11]))
    responses.add(ci[:1], tokens[:1])
    responses.add(ci[1:], tokens[1:])
    found = [(one.token, one.mean_ci, one.count) for one in responses.strongest(0, NAMES)]
    assert found == [("t3", 0.75, 3), ("t9", 0.75, 2), ("t7", 0.5, 2)]


BATCHES = [torch.tensor([[0, 1, 2], [2, -1, -1]]), torch.tensor([[1, 1, -1], [0, 0, 2]])]


def looked(language: ModuleType, batches: list[torch.Tensor] | None = None, **changes: Any) -> Any:
    objective = language.objective_of(language.hand_made())
    zeros = np.zeros((3, 3))
    sites = {
        site: SiteEvaluation(
            weight=zeros, V=zeros, U=zeros, mean_ci=mean, density=mean > 0, histogram=np.zeros(2), order=mean
        )
        for site, mean in {"embed": np.ones(3), "unembed": np.array([1.0, 0.5, 0.0])}.items()
    }
    settings = {"decode": lambda ids: [f"<{i}>" for i in ids], "subcomponents": 2, "contexts": 4} | changes
    return look(objective, BATCHES if batches is None else batches, sites, **settings)


def test_the_heaviest_alive_subcomponents_are_described(language: ModuleType) -> None:
    text = looked(language, subcomponents=3)
    assert {site: [one.index for one in own] for site, own in text.sites.items()} == {
        "embed": [0, 1, 2],
        "unembed": [0, 1],  # the third is dead
    }
    second = text.sites["unembed"][1]
    assert (second.mean_ci, second.density) == (0.5, 1.0)
    assert {one.token: (one.mean_ci, one.count) for one in second.tokens} == {
        "<0>": (0.5, 3), "<1>": (0.5, 3), "<2>": (0.5, 3),
    }  # fmt: skip
    assert len(second.contexts) == 4
    assert [len(own) for own in looked(language).sites.values()] == [2, 2]


def test_examples_count_active_subcomponents_at_every_token_without_padding(language: ModuleType) -> None:
    text = looked(language)
    assert [one.tokens for one in text.examples] == [["<0>", "<1>", "<2>"], ["<2>"]]
    assert text.examples[0].active == {"embed": [3, 3, 3], "unembed": [2, 2, 2]}
    assert text.examples[0].total_ci == {"embed": [3.0] * 3, "unembed": [1.5] * 3}
    assert text.positions == 9


def test_ids_are_shown_where_nobody_can_decode_them(language: ModuleType) -> None:
    assert looked(language, decode=lambda ids: None).examples[0].tokens == ["0", "1", "2"]


def test_what_completes_a_character_is_shown_as_that_character(language: ModuleType) -> None:
    text = looked(language, decode=lambda ids: ["⟨E6 97⟩", "⟨A5⟩", "c"], contexts=100)
    assert text.examples[0].tokens == ["⟨E6 97⟩", "日", "c"]
    names = {one.token for own in text.sites.values() for sub in own for one in sub.tokens}
    assert names == {"⟨E6 97⟩", "⟨A5⟩", "c"}
    assert any("日" in one.tokens for own in text.sites.values() for sub in own for one in sub.contexts)


def test_text_that_no_file_could_hold_is_replaced(language: ModuleType) -> None:
    tokens = looked(language, decode=lambda ids: ["\ud800", "b", "c"]).examples[0].tokens
    assert tokens == ["?", "b", "c"]


def test_rows_that_come_again_are_looked_at_once(language: ModuleType) -> None:
    once = looked(language, contexts=100)
    assert max(len(one.contexts) for own in once.sites.values() for one in own) == 9  # every position
    again = [*BATCHES, BATCHES[0].flip(0), torch.cat([BATCHES[1], BATCHES[1]])]
    assert looked(language, again, contexts=100) == once


@pytest.mark.parametrize(("rank", "kept"), [(0, [[1, 1], [2, 2], [-1, -1]]), (1, [[-1, -1], [3, 3]])])
def test_rows_that_an_earlier_rank_has_are_left_to_it(
    rank: int, kept: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = [torch.tensor([[1, 1], [2, 2], [1, 1]]), torch.tensor([[2, 2], [3, 3]])]
    of_one_shape = torch.cat([*ranks, torch.tensor([[-1, -1]])])
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "largest", lambda numbers: [3])
    monkeypatch.setattr(distributed, "side_by_side", lambda own: of_one_shape)
    found = _without_repeats(torch.split(ranks[rank], 2))
    assert torch.cat(found).tolist() == kept
