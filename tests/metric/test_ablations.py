"""Cross-entropy and divergence of ablated models, against numbers worked out without a model."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from spd_hydra import rng
from spd_hydra.loss.ascent import Start
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.pgd_recon import PGDRecon
from spd_hydra.metric.ablations import (
    Ablations,
    AblationSettings,
    cross_entropy_sum,
    mask_kinds,
    rounded_name,
)
from spd_hydra.sampler import position_index

TOKENS = torch.tensor([[0, 1, 2, 0], [2, 2, -1, -1]])
PAIRS = [(0, 1), (1, 2), (2, 0), (2, 2)]  # (token, next token) where both are real
POSITIONS = [0, 1, 2, 0, 2, 2]  # tokens that are real
DRAW = 0.25  # every random number
FORESEEN = torch.tensor([[0, 0, 0, 1], [1, 1, 2, 2]])  # the target gives these a better chance than a third

Found = dict[str, float]


@pytest.fixture
def measured(language: ModuleType) -> Callable[..., Found]:
    def measure(*, tokens: Tensor = TOKENS, divergence: Divergence = Divergence.kl, **settings: Any) -> Found:
        objective = language.objective_of(language.hand_made(), divergence)
        settings = {"next_token": True, "rounded": [0.0, 0.75]} | settings
        ablations = Ablations(objective, AblationSettings(**settings))
        ablations.add(objective.inputs(tokens), lambda purpose, n: torch.full((*tokens.shape, n), DRAW))
        return ablations.metrics()

    return measure


def expected_logits(language: ModuleType) -> dict[str, Tensor]:
    """Logits by kind of mask, one row per token: every position masks the piece of its own token alone."""
    pieces, target, g = language.PIECES, language.CHANCES.log(), language.IMPORTANCES[:, None]
    stochastic = g + (1 - g) * DRAW
    return {
        "target": target,
        "unmasked": pieces,
        # At `embed` g is 1 and nothing is missed, so masks and delta there change nothing.
        "stochastic": (stochastic - DRAW) * pieces + DRAW * target,
        "ci": g * pieces,
        "rounded_0": torch.tensor([[1.0], [1.0], [0.0]]) * pieces,
        "rounded_0.75": torch.tensor([[1.0], [0.0], [0.0]]) * pieces,
        "random": DRAW * DRAW * pieces,  # at both sites
        "zero": torch.zeros(3, 3),
    }


def by_hand(logits: Tensor, chances: Tensor) -> tuple[float, float]:
    """CE over the pairs and KL(target ‖ masked) over the positions."""
    log_q = logits.double() - logits.double().exp().sum(-1, keepdim=True).log()
    ce = -sum(float(log_q[token, following]) for token, following in PAIRS) / len(PAIRS)
    p = chances.double()
    kl = [float((p[t] * (p[t].log() - log_q[t])).sum()) for t in POSITIONS]
    return ce, sum(kl) / len(kl)


def test_thresholds_that_differ_have_names_that_differ() -> None:
    assert [rounded_name(t) for t in (0.0, 0.5, 0.12345678, 0.12345679)] == [
        "rounded_0",
        "rounded_0.5",
        "rounded_0.12345678",
        "rounded_0.12345679",
    ]


def test_every_kind_of_mask_has_the_cross_entropy_and_the_divergence_worked_out_by_hand(
    measured: Callable[..., Found], language: ModuleType
) -> None:
    found = measured()
    kinds = expected_logits(language)
    expected = {name: by_hand(logits, language.CHANCES) for name, logits in kinds.items()}
    assert {name for name in found if name.startswith("ce/")} == {f"ce/{name}" for name in kinds}
    for name, (ce, kl) in expected.items():
        assert found[f"ce/{name}"] == pytest.approx(ce, rel=1e-5), name
        if name != "target":
            assert found[f"kl/{name}"] == pytest.approx(kl, rel=1e-4, abs=1e-6), name


def test_of_masked_tokens_the_cross_entropy_is_that_of_what_they_stand_for(language: ModuleType) -> None:
    objective = language.objective_of(language.hand_made(), Divergence.mse)
    ablations = Ablations(
        objective, AblationSettings(next_token=False, rounded=[0.0, 0.75], fills_masks=True)
    )
    answers = torch.tensor([[-100, 2, -100, 1], [0, -100, -100, -100]])
    ablations.add(objective.inputs(TOKENS), lambda purpose, n: torch.full((*TOKENS.shape, n), DRAW), answers)
    found = ablations.metrics()
    asked = [
        (int(TOKENS[where]), int(answers[where])) for where in [(0, 1), (0, 3), (1, 0)]
    ]  # seen, asked for
    for name, logits in expected_logits(language).items():
        log_q = logits.double().log_softmax(-1)
        expected = -sum(float(log_q[seen, answer]) for seen, answer in asked) / len(asked)
        assert found[f"ce/{name}"] == pytest.approx(expected, rel=1e-5), name
    assert found["kl/ci"] == pytest.approx(
        by_hand(expected_logits(language)["ci"], language.CHANCES)[1], rel=1e-4
    )  # of all positions


def test_without_mask_tokens_a_model_that_fills_them_has_no_cross_entropy(
    measured: Callable[..., Found],
) -> None:
    found = measured(next_token=False, fills_masks=True)
    assert not any(name.startswith("ce") for name in found)
    assert "kl/ci" in found


def test_all_off_is_the_uniform_guess_and_recovers_nothing(measured: Callable[..., Found]) -> None:
    found = measured(tokens=FORESEEN)
    assert found["ce/zero"] == pytest.approx(torch.tensor(3.0).log().item())
    assert "ce_recovered/zero" not in found
    assert "ce_recovered/target" not in found
    room = found["ce/zero"] - found["ce/target"]
    for name in ("unmasked", "stochastic", "ci", "rounded_0", "random"):
        share = (found["ce/zero"] - found[f"ce/{name}"]) / room
        assert found[f"ce_recovered/{name}"] == pytest.approx(share)


def test_no_share_is_recovered_where_all_off_is_no_worse_than_the_target(
    measured: Callable[..., Found],
) -> None:
    found = measured()
    assert found["ce/target"] > found["ce/zero"]
    assert not any(name.startswith("ce_recovered") for name in found)


@pytest.mark.parametrize(
    ("zero", "shares"),
    [
        (3.0, None),
        (4.0, None),
        (4.003, None),  # a room of 0.003 is less than a thousandth of the target's 4
        (4.005, {"unmasked": 1.0, "stochastic": 0.8, "ci": 0.6, "random": 0.2}),
        (float("nan"), None),  # no position has a next token
    ],
)
def test_a_share_needs_more_room_than_a_thousandth_of_the_targets_cross_entropy(
    language: ModuleType, zero: float, shares: Found | None
) -> None:
    ablations = Ablations(language.objective_of(language.hand_made()), AblationSettings(next_token=True))
    lost = {"target": 0.0, "unmasked": 0.0, "stochastic": 0.001, "ci": 0.002, "random": 0.004}
    means = {**{name: 4 + more for name, more in lost.items()}, "zero": zero}
    ablations.sums = {f"ce/{name}": torch.tensor([10 * mean, 10.0]).double() for name, mean in means.items()}
    found = {
        name.removeprefix("ce_recovered/"): share
        for name, share in ablations.metrics().items()
        if name.startswith("ce_recovered/")
    }
    assert found == pytest.approx(shares or {}, abs=1e-4)


def test_groups_are_masked_alone_while_the_others_stay_the_targets_own(
    measured: Callable[..., Found], language: ModuleType
) -> None:
    found = measured(groups={"reads": ["embed"], "writes": ["unembed"]})
    ce, kl = by_hand(language.IMPORTANCES[:, None] * language.PIECES, language.CHANCES)
    assert found["ce_subset/writes"] == pytest.approx(ce, rel=1e-5)
    assert found["kl_subset/writes"] == pytest.approx(kl, rel=1e-4)
    assert found["ce_subset/reads"] == pytest.approx(found["ce/target"], rel=1e-6)  # nothing is missed there
    assert found["kl_subset/reads"] == pytest.approx(0, abs=1e-6)


def test_a_single_group_is_all_sites_and_is_not_measured_twice(measured: Callable[..., Found]) -> None:
    assert not any("subset" in name for name in measured(groups={"all": ["embed", "unembed"]}))


def test_padding_changes_no_number(measured: Callable[..., Found]) -> None:
    rows = [[0, 1, 2, 0, -1, -1], [-1, 2, 2, -1, -1, -1]]  # padding on the left too
    assert measured(tokens=torch.tensor(rows)) == pytest.approx(measured(), rel=1e-6)


def test_models_that_do_not_predict_the_next_token_have_their_own_divergence_alone(
    measured: Callable[..., Found], language: ModuleType
) -> None:
    found = measured(next_token=False, divergence=Divergence.mse)
    assert {name.partition("/")[0] for name in found} == {"mse"}
    target = language.CHANCES.log()
    squares = [float((target[token] ** 2).mean()) for token in POSITIONS]
    assert found["mse/zero"] == pytest.approx(sum(squares) / len(squares), rel=1e-5)


def test_parts_of_a_batch_add_up_to_the_whole(language: ModuleType) -> None:
    objective = language.objective_of(language.hand_made())
    settings = AblationSettings(next_token=True, rounded=[0.5], groups={"a": ["embed"], "b": ["unembed"]})
    tokens = torch.tensor([[0, 1, 2, 0], [2, 2, -1, -1], [1, 1, 0, 2], [-1, -1, -1, -1]])
    key = rng.key(0, "eval/masks")

    def added(ablations: Ablations, rows: list[int]) -> Ablations:
        index = position_index(torch.tensor(rows, dtype=torch.int32), (4,))
        ablations.add(
            objective.inputs(tokens[rows]),
            lambda purpose, n: rng.uniform(key, index, rng.columns(purpose, n)),
        )
        return ablations

    whole = added(Ablations(objective, settings), [0, 1, 2, 3])
    in_parts = Ablations(objective, settings)
    for rows in ([2], [3], [0, 1]):
        added(in_parts, rows)
    ranks = [added(Ablations(objective, settings), rows).sums for rows in ([0, 3], [1, 2])]
    assert in_parts.metrics() == pytest.approx(whole.metrics(), rel=1e-6, abs=1e-6)
    for name, sums in whole.sums.items():
        torch.testing.assert_close(ranks[0][name] + ranks[1][name], sums, rtol=1e-6, atol=1e-6)


def test_the_last_position_and_those_before_padding_have_no_cross_entropy() -> None:
    logits = torch.tensor([[[5.0, 0.0], [0.0, 1.0], [9.0, 9.0]]])
    total, count = cross_entropy_sum(logits, torch.tensor([[0, 1, -1]]))
    assert count == 1
    assert float(total) == pytest.approx(
        5.0 + torch.tensor(-5.0).exp().log1p().item()
    )  # of token 1 at the first
    total, count = cross_entropy_sum(logits, torch.tensor([[1, -1, -1]]))
    assert (float(total), count) == (0.0, 0)


def test_random_masks_do_not_look_at_causal_importances(language: ModuleType) -> None:
    model = language.hand_made()
    kind = mask_kinds(model.config)["random"]
    draws = torch.rand(2, 4, 3, generator=torch.Generator().manual_seed(0))
    ci = model.causal_importances(TOKENS)
    assert torch.equal(kind.make(ci["embed"], draws).mask, kind.make(ci["unembed"], draws).mask)
    assert kind.make(ci["embed"], draws).delta is None


def test_an_adversary_is_never_weaker_than_its_start_and_gains_with_its_steps(
    measured: Callable[..., Found],
) -> None:
    steps = (0, 1, 5, 20)
    for divergence in (Divergence.mse, Divergence.kl):  # of training; that of a model of the next token is KL
        for start in (Start.zeros, Start.random):
            terms = {f"pgd/{n}": PGDRecon(n_steps=n, step_size=0.1, start=start) for n in steps}
            found = measured(adversaries=terms, divergence=divergence)
            values = [found[f"pgd/{n}"] for n in steps]
            assert values == sorted(values)
            if start is Start.zeros:  # masks are g
                assert values[0] == pytest.approx(found["kl/ci"], rel=1e-5)
            else:
                assert values[-1] > 1.5 * values[0]


def test_adversaries_alone_need_no_masks(measured: Callable[..., Found]) -> None:
    assert set(measured(adversaries={"pgd/2": PGDRecon(n_steps=2)}, masks=False)) == {"pgd/2"}
