"""What a diagnosis says of causal importances and metrics made by hand, each with exactly one thing wrong."""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest

from spd_hydra.metric.diagnosis import diagnose
from spd_hydra.metric.evaluation import Evaluation, SiteCheck, SiteEvaluation
from spd_hydra.metric.finding import Finding, Settings, listed
from spd_hydra.metric.symptoms import (
    best_cosines,
    fall_of_l0,
    identity_symptoms,
    jump_of_gradient,
    lone,
    needed,
)
from spd_hydra.metric.target_ci import dense_error, identity_error
from spd_hydra.model.base import Measurement

N, C = 5, 8
RIGHT = np.eye(N, C)
SETTINGS = Settings(
    steps=6000, restarts=1, sparsity_term="importance_minimality", sparsity_coeff=3e-3, adversary_coeff=0.0,
    lr=1e-3, clip_ci_fn=None,
    certified=True, measurements=[],
    sites={"embed": ("first", C), "unembed": ("second", C)}, tied={"unembed": "embed"}, max_tries=100,
    short_target=None, anneals_late=False,
)  # fmt: skip
SETTINGS_OF_BOTH = dataclasses.replace(
    SETTINGS, sites={"embed": ("first", C), "hidden": ("hidden", C)}, tied={}
)
STEADY = [{"step": step, "split": "eval", "l0/total": 0.5} for step in range(1000, 7000, 1000)]


def changed(*entries: tuple[int, int, float]) -> np.ndarray:
    """One subcomponent for each feature, but for these entries."""
    g = RIGHT.copy()
    for feature, subcomponent, value in entries:
        g[feature, subcomponent] = value
    return g


def site(g: np.ndarray, U: np.ndarray | None = None) -> SiteEvaluation:
    """A site whose matrix is the identity, with V = 1 and these causal importances on single features."""
    n, columns = g.shape
    return SiteEvaluation(
        weight=np.eye(n), V=np.eye(n, columns), U=np.eye(columns, n) if U is None else U,
        mean_ci=np.zeros(columns), density=np.zeros(columns), histogram=np.zeros(2, dtype=int),
        order=np.arange(columns), probe_lower=g, directions=np.eye(n),
    )  # fmt: skip


def evaluation(
    identity: np.ndarray = RIGHT, dense: np.ndarray | None = None, expected: int = 2, **changes: Any
) -> Evaluation:
    """An unsolved one of the site `embed` and, if given, a dense site `hidden`."""
    sites, checks = {"embed": site(identity)}, []
    for tolerance in (0.1, 0.2):
        error = identity_error(identity, tolerance).error
        checks.append(SiteCheck(name="identity", site="embed", tolerance=tolerance, error=error, expected=N))
        if dense is not None:
            sites["hidden"] = site(dense)
            error = dense_error(dense, expected, tolerance).error
            checks.append(
                SiteCheck(name="dense", site="hidden", tolerance=tolerance, error=error, expected=expected)
            )
    metrics = {"l0_ideal/embed": 0.25, "l0/embed": 0.25}
    measured: dict[str, Any] = {"metrics": metrics, "mmcs": 1.0, "ml2r": 1.0, "solved": False} | changes
    return Evaluation(
        step=6000, n_positions=100, ci_threshold=0.1, sites=sites, checks=checks, strict=False, **measured
    )


def only(
    found: Evaluation, settings: Settings = SETTINGS, history: list[dict[str, Any]] | None = None
) -> Finding:
    """The one finding."""
    (finding,) = diagnose(found, STEADY if history is None else history, settings)
    return finding


# ---- one symptom each -------------------------------------------------------------------------------


def test_a_solved_run_has_none() -> None:
    assert diagnose(evaluation(solved=True), [], SETTINGS) == []
    falling = [{"step": step, "split": "eval", "l0/total": 1e4 / step} for step in (4500, 6000)]
    assert diagnose(evaluation(solved=True), falling, SETTINGS) == []


def test_features_that_share_a_subcomponent_are_named_and_restarts_advised() -> None:
    shared = changed((1, 1, 0.0), (1, 3, 0.97), (3, 3, 0.98))
    assert only(evaluation(shared)) == Finding(
        symptom="embed: features 1 and 3 share subcomponent 3 (g 0.97 and 0.98)",
        advice="a local minimum: try train.restarts.number=8 (now 1)",
        site="embed",
    )
    again = only(evaluation(shared), dataclasses.replace(SETTINGS, restarts=16))
    assert "train.restarts.number=32 (now 16)" in again.advice


def test_a_feature_that_is_split_is_named() -> None:
    finding = only(evaluation(changed((2, 6, 0.9))))
    assert finding.symptom == "embed: feature 2 is split over subcomponents 2 and 6 (g 1.00 and 0.90)"
    assert "train.restarts.number=8" in finding.advice


def test_a_split_that_is_not_settled_asks_for_more_steps() -> None:
    finding = only(evaluation(changed((2, 6, 0.4))))
    assert finding.symptom == "embed: feature 2 is split over subcomponents 2 and 6 (g 1.00 and 0.40)"
    assert finding.advice == "try train.steps=12000 (now 6000)"


def test_features_that_no_subcomponent_is_important_for_ask_for_half_the_coefficient() -> None:
    finding = only(evaluation(changed((0, 0, 0.5), (1, 1, 0.6), (4, 4, 0.4))))
    assert finding == Finding(
        symptom="embed: features 0, 1 and 4 have no subcomponent with g ≥ 0.8 (largest 0.6)",
        advice="the coefficient is too high: try loss.importance_minimality.coeff=0.0015 (now 0.003)",
        site="embed",
    )


def test_where_nothing_is_important_a_tenth_of_the_coefficient_is_advised() -> None:
    finding = only(evaluation(np.full((N, C), 0.01)))
    assert finding.symptom == "embed: no subcomponent is needed by any feature (largest g 0.01)"
    assert "loss.importance_minimality.coeff=0.0003 (now 0.003)" in finding.advice


def test_several_subcomponents_per_feature_ask_for_twice_the_coefficient() -> None:
    several = np.zeros((N, C))
    several[:, :3] = 1.0
    finding = only(evaluation(several))
    assert finding.symptom == "embed: 3 subcomponents with g > 0.2 per feature, not 1"
    assert finding.advice == (
        "the coefficient is too low: try loss.importance_minimality.coeff=0.006 (now 0.003)"
    )


@pytest.mark.parametrize(("l0", "coeff"), [(0.6, "0.006"), (1.1, "0.03")])
def test_an_l0_far_above_the_ideal_asks_for_a_higher_coefficient(l0: float, coeff: str) -> None:
    found = evaluation(changed((2, 6, 0.3)), metrics={"l0_ideal/embed": 0.25, "l0/embed": l0})
    finding = only(found)
    assert finding.symptom == f"embed: L0 {l0:g}, ideally 0.25"
    assert f"coeff={coeff} (now 0.003)" in finding.advice


def test_a_coefficient_of_nothing_is_not_doubled() -> None:
    several = np.ones((N, C))
    finding = only(evaluation(several), dataclasses.replace(SETTINGS, sparsity_coeff=0.0))
    assert "loss.importance_minimality.coeff=0.001 (now 0)" in finding.advice


def test_advice_on_sparsity_names_the_term_that_is_trained_on() -> None:
    smooth = dataclasses.replace(SETTINGS, sparsity_term="smooth_l0")
    assert "too low: try loss.smooth_l0.coeff=" in only(evaluation(np.ones((N, C))), smooth).advice
    assert "too high: try loss.smooth_l0.coeff=" in only(evaluation(np.zeros((N, C))), smooth).advice


def test_too_small_a_c_names_every_tied_key_and_nothing_that_follows_from_it() -> None:
    settings = dataclasses.replace(SETTINGS, sites={"embed": ("first", 4), "unembed": ("second", 4)})
    finding = only(evaluation(np.ones((N, 4))), settings)
    assert finding.symptom == "embed: 4 subcomponents where the known answer has 5"
    assert finding.advice == "try decomposition.sites.first.C=10 decomposition.sites.second.C=10 (now 4)"


@pytest.mark.parametrize(
    ("columns", "found", "words"),
    [(4, "4 subcomponents are", "too low: try"), (1, "1 subcomponent is", "too high: try")],
)
def test_a_dense_site_with_too_many_or_too_few_says_so(columns: int, found: str, words: str) -> None:
    dense = np.zeros((N, C))
    dense[:, :columns] = 1.0
    settings = dataclasses.replace(SETTINGS, sites={"embed": ("first", C), "hidden": ("hidden", C)}, tied={})
    metrics = {"alive/hidden": 7.0}
    finding = only(evaluation(dense=dense, metrics=metrics), settings)
    assert finding.symptom == f"hidden: {found} needed (7 alive), not 2"
    assert words in finding.advice


@pytest.mark.parametrize(("now", "wanted"), [(0.0, "0.4"), (0.3, "0.6")])
def test_what_serves_one_feature_alone_at_a_dense_site_asks_for_an_adversary(now: float, wanted: str) -> None:
    dense = np.zeros((N, C))
    dense[:, :2] = 1.0
    dense[3, 6] = dense[1, 7] = 0.97
    settings = dataclasses.replace(SETTINGS_OF_BOTH, adversary_coeff=now)
    assert only(evaluation(dense=dense), settings) == Finding(
        symptom="hidden: subcomponent 6 serves feature 3 alone (g 0.97), in place of the 2 that features "
        "share, and 1 more such",
        advice=f"an adversary takes such away: try loss.pgd_recon_subset.coeff={wanted} (now {now:g})",
        site="hidden",
    )


def test_what_most_features_need_asks_for_a_weaker_adversary_if_there_is_one() -> None:
    common = RIGHT.copy()
    common[:4, 6] = 0.9
    settings = dataclasses.replace(SETTINGS, adversary_coeff=1.0)
    assert only(evaluation(common), settings) == Finding(
        symptom="embed: subcomponent 6 is needed by 4 of 5 features",
        advice="the adversary is too strong: try loss.pgd_recon_subset.coeff=0.5 (now 1)",
        site="embed",
    )
    assert "features 0, 1, 2 and 3 share subcomponent 6" in only(evaluation(common)).symptom


def test_a_bad_target_is_all_that_is_told() -> None:
    bad = [Measurement(name="response", value=0.123456, lower=0.5, upper=1.0),
           Measurement(name="margin", value=0.3, lower=0.0, upper=1.0)]  # fmt: skip
    settings = dataclasses.replace(SETTINGS, certified=False, measurements=bad)
    finding = only(evaluation(np.ones((N, C))), settings)
    assert finding.symptom == (
        "the target is not certified (out of bounds: response 0.123), so its decomposition proves nothing"
    )
    assert finding.advice == "try model.training.max_tries=200 (now 100), or another seed"
    elsewhere = only(evaluation(), dataclasses.replace(settings, max_tries=None))
    assert elsewhere.advice == "try another seed"


def test_of_a_target_that_target_steps_kept_short_more_tries_are_not_advised() -> None:
    settings = dataclasses.replace(SETTINGS, certified=False, max_tries=1, short_target=100)
    assert only(evaluation(np.ones((N, C))), settings).advice == (
        "target_steps, as debug=smoke sets it, trained the target in one try of 100 steps only, so it is not "
        "meant to be certified: leave out debug=smoke or target_steps"
    )


def test_a_missing_direction_names_the_feature() -> None:
    U = np.eye(C, N)
    U[3] = [0, 0, 0, 0.6, 0.8]  # cosine 0.6 with feature 3
    found = dataclasses.replace(evaluation(mmcs=0.92), sites={"embed": site(RIGHT, U)})
    finding = only(found)
    assert finding.symptom == (
        "embed: no subcomponent points in the direction of feature 3 (largest cosine 0.60)"
    )
    assert "train.restarts.number=8" in finding.advice


def test_an_l0_that_still_falls_asks_for_more_steps_and_explains_what_is_too_many() -> None:
    history = [{"step": step, "split": "eval", "l0/total": l0} for step, l0 in [(4500, 2.0), (6000, 1.5)]]
    finding = only(evaluation(np.ones((N, C))), history=history)
    assert finding.symptom == (
        "L0 still falls: 2 at step 4,500, 1.5 at step 6,000, 25% per quarter of training"
    )
    assert finding.advice == "try train.steps=12000 (now 6000)"


def test_an_l0_that_falls_with_the_annealing_of_the_loss_hides_nothing() -> None:
    history = [{"step": step, "split": "eval", "l0/total": l0} for step, l0 in [(4500, 2.0), (6000, 1.5)]]
    annealed = dataclasses.replace(SETTINGS, anneals_late=True)
    shared = changed((1, 1, 0.0), (1, 3, 0.97), (3, 3, 0.98))
    assert "L0 still falls" in only(evaluation(shared), history=history).symptom
    assert "features 1 and 3 share subcomponent 3" in only(evaluation(shared), annealed, history).symptom


def test_importances_between_on_and_off_ask_for_many_more_steps() -> None:
    undecided = RIGHT.copy()
    undecided[:, 5] = 0.5
    finding = only(evaluation(undecided))
    assert finding.symptom == "1 causal importances per feature are neither on nor off (0.2 to 0.8)"
    assert finding.advice == "try train.steps=24000 (now 6000)"


def test_while_causal_importances_are_undecided_no_coefficient_is_called_too_high() -> None:
    early = np.zeros((N, C))
    early[:, :3] = 0.6  # no feature has one near 1, which says nothing yet
    finding = only(evaluation(early))
    assert finding.symptom == "2 causal importances per feature are neither on nor off (0.2 to 0.8)"
    assert finding.advice == "try train.steps=24000 (now 6000)"


def test_where_l0_falls_and_most_features_are_lost_more_steps_come_first() -> None:
    history = [{"step": step, "split": "eval", "l0/total": l0} for step, l0 in [(4500, 2.0), (6000, 1.5)]]
    lost = changed((0, 0, 0.3), (1, 1, 0.3), (2, 2, 0.3))  # three of five
    steps, coefficient = diagnose(evaluation(lost), history, SETTINGS)
    assert "try train.steps=" in steps.advice
    assert "too high" in coefficient.advice


def test_a_jump_of_the_gradient_asks_for_clipping_also_without_a_known_answer() -> None:
    norms = [0.01] * 20 + [2.0] * 3
    history = [{"step": s, "split": "train", "grad_norm/ci_fn": norm} for s, norm in enumerate(norms)]
    for limit, advice in [(None, "clip_ci_fn=0.1 (now null)"), (0.1, "lr=0.0005 (now 0.001)")]:
        settings = dataclasses.replace(SETTINGS, clip_ci_fn=limit)
        finding = only(evaluation(np.ones((N, C)), solved=None), settings, history)
        assert finding.symptom == (
            "training became unstable: the gradient norm of the ci_fn is 2 in the last rows, 200 times its "
            "median 0.01"
        )
        assert finding.advice == f"try train.{advice}"


def test_without_a_known_answer_only_what_needs_none_is_told() -> None:
    assert diagnose(evaluation(np.ones((N, C)), solved=None), STEADY, SETTINGS) == []
    history = [{"step": step, "split": "eval", "l0/total": l0} for step, l0 in [(4500, 2.0), (6000, 1.5)]]
    assert "train.steps" in only(evaluation(np.ones((N, C)), solved=None), history=history).advice


def test_where_nothing_stands_out_it_is_said() -> None:
    finding = only(evaluation(ml2r=0.9))
    assert finding.symptom == "no single cause stands out (wrong entries: none, ML2R 0.9)"
    assert "train.steps=12000" in finding.advice


# ---- several at once --------------------------------------------------------------------------------


def test_the_stronger_of_two_contradictory_cases_is_told() -> None:
    dense = np.zeros((N, C))
    dense[:, :3] = 1.0  # one too many of two: half
    mostly_gone = changed((0, 0, 0.3), (1, 1, 0.3), (2, 2, 0.3))  # three of five
    advice = [one.advice for one in diagnose(evaluation(mostly_gone, dense), STEADY, SETTINGS_OF_BOTH)]
    assert len(advice) == 1
    assert "too high" in advice[0]
    one_gone = changed((0, 0, 0.3))
    (first,) = diagnose(evaluation(one_gone, dense), STEADY, SETTINGS_OF_BOTH)
    assert "too low" in first.advice


def test_sites_with_the_same_trouble_share_a_finding() -> None:
    shared = changed((1, 1, 0.0), (1, 3, 0.97), (3, 3, 0.98))
    found = evaluation(shared)
    other = [dataclasses.replace(check, site="unembed") for check in found.checks]
    found = dataclasses.replace(
        found, sites=found.sites | {"unembed": site(shared)}, checks=[*found.checks, *other]
    )
    assert only(found).symptom.endswith("(g 0.97 and 0.98) (likewise at unembed)")


def test_sites_with_other_troubles_are_not_told_to_have_the_same() -> None:
    nothing, one_of_two = np.zeros((N, C)), np.zeros((N, C))
    one_of_two[:, 0] = 1.0
    (finding,) = diagnose(evaluation(nothing, one_of_two), STEADY, SETTINGS_OF_BOTH)
    assert finding.symptom == "embed: no subcomponent is needed by any feature (largest g 0.00)"


# ---- measurements -----------------------------------------------------------------------------------


def test_the_known_answer_has_no_symptoms() -> None:
    seen = identity_symptoms(RIGHT)
    assert (seen.unserved, seen.shared, seen.split) == ([], [], [])
    assert (seen.per_feature, seen.undecided) == (1.0, 0.0)


def test_a_dense_site_needs_what_the_check_counts() -> None:
    g = np.zeros((3, 6))
    g[0, 1], g[1, 3], g[2, 4], g[:, 5] = 1.0, 0.5, 0.9, 0.1
    assert needed(g, expected=2) == 3  # columns 1 and 4 near 1, and column 3 on beyond the two heaviest
    assert needed(g, expected=3) == 2  # column 3 is now one of the heaviest and not near 1


def test_lone_subcomponents_are_those_beyond_the_heaviest_that_one_feature_needs() -> None:
    g = np.zeros((3, 6))
    g[:, 1] = g[:2, 3] = 1.0  # the heaviest two
    g[2, 0], g[1, 4], g[:2, 5] = 0.9, 0.1, 0.3  # one alone, one off, one for two
    assert lone(g, expected=2) == [(0, 2, 0.9)]


def test_few_evaluations_are_compared_per_quarter_of_training() -> None:
    rows = [{"step": step, "split": "eval", "l0/total": l0} for step, l0 in [(200, 16.0), (400, 8.0)]]
    fall = fall_of_l0(rows)
    assert fall is not None
    assert fall.share == pytest.approx(1 - 0.5**0.5)  # half of it in two quarters
    assert fall_of_l0(rows[:1]) is None


@pytest.mark.parametrize("what", ["ci_threshold", "n_positions"])
def test_an_evaluation_that_measures_otherwise_shows_no_fall(what: str) -> None:
    rows = [
        {"step": 300, "split": "eval", "l0/total": 16.0, what: 0.1},
        {"step": 350, "split": "eval", "l0/total": 8.1, what: 0.5},
        {"step": 400, "split": "eval", "l0/total": 8.0, what: 0.5},
    ]
    assert fall_of_l0(rows) is None
    assert fall_of_l0([row | {what: 0.5} for row in rows]) is not None
    assert fall_of_l0([rows[0], rows[2]]) is None


def test_training_rows_serve_where_there_are_no_evaluations_and_noise_is_no_fall() -> None:
    steps = range(100, 1100, 100)
    line = [{"step": s, "split": "train", "l0/total": 3 - s / 1000} for s in steps]
    fall = fall_of_l0(line)
    assert fall is not None
    assert fall.first_step == 500
    assert (fall.first, fall.last) == pytest.approx((2.5, 2.0))
    noisy = [row | {"l0/total": 1.0 + 0.2 * (-1) ** i} for i, row in enumerate(line)]
    assert fall_of_l0(noisy) is None


def test_a_gradient_that_shrinks_is_no_jump() -> None:
    rows = [{"step": s, "split": "train", "grad_norm/ci_fn": 1.0 / (1 + s)} for s in range(30)]
    assert jump_of_gradient(rows) is None
    assert jump_of_gradient([]) is None


def test_cosines_are_those_of_the_formula(synthetic: Any) -> None:
    found = synthetic.tms(solved=False).sites["embed"]
    for feature, best in enumerate(best_cosines(found)):
        column = found.weight[:, feature]
        offered = [found.U[c] * found.V[feature, c] for c in range(found.V.shape[1])]
        by_hand = [o @ column / np.linalg.norm(o) / np.linalg.norm(column) for o in offered]
        assert best == pytest.approx(max(by_hand))


def test_long_lists_are_cut() -> None:
    assert listed([3], "feature") == "feature 3"
    assert listed([1, 2, 3, 4, 5, 6], "feature") == "features 1, 2, 3, 4 and 2 more"
    assert listed(["embed", "unembed"]) == "embed and unembed"


def test_a_residual_mlp_is_diagnosed_too(synthetic: Any) -> None:
    found = synthetic.resid_mlp()
    sites = {"layers.0.mlp_in": ("mlp_in", 140), "layers.0.mlp_out": ("mlp_out", 140)}
    finding = only(found, dataclasses.replace(SETTINGS, sites=sites, tied={}))
    assert finding.site == "layers.0.mlp_out"
    assert re.fullmatch(r"layers.0.mlp_out: subcomponent \d+ serves feature \d+ alone .*", finding.symptom)
