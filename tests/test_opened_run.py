"""Ways to look into an opened run: its name, checkpoints, what is alive, effects, prompts, another run."""

import itertools
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_hydra import decompose
from spd_hydra.api import Run, load_run
from spd_hydra.config import RunConfig
from spd_hydra.section import ConfigError

Toy = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, target_cache: Path) -> Run:
    """A toy of 20 steps with checkpoints at 10 and 20."""
    places = [f"out_dir={tmp_path_factory.mktemp('runs')}", f"cache_dir={target_cache}"]
    small = ["model.training.batch_size=64", "eval.figures=false"]
    return decompose(["debug=smoke", *places, *small])


def test_a_run_shows_its_name_steps_verdict_and_path(done: Run) -> None:
    assert repr(done) == f"Run(tms_5-2, seed 0, step 20 of 20, done, not solved, '{done.path}')"


def test_at_a_step_there_is_no_verdict_or_result_but_that_of_the_step(done: Run) -> None:
    assert repr(done.at(10)) == f"Run(tms_5-2, seed 0, step 10 of 20, '{done.path}')"
    assert (done.at(10).summary, done.at(10).subcomponents) == ({}, {})
    assert repr(done.at(20)) == f"Run(tms_5-2, seed 0, step 20 of 20, not solved, '{done.path}')"
    assert done.at(20).summary == done.summary
    assert done.summary["steps"] == 20


def test_runs_are_told_apart_by_directory_and_step(done: Run) -> None:
    runs = {done, done.at(10), load_run(done.path, trust_remote_code=True)}
    assert {run.step for run in runs} == {None, 10}
    assert len(runs) == 2


def test_a_run_is_pickled_with_the_model_that_was_read(done: Run) -> None:
    x = 0.75 * torch.eye(5)
    found = pickle.loads(pickle.dumps(done.at(10)))  # noqa: S301
    assert (found, found.path) == (done.at(10), done.path)
    assert done.model is not None
    found = pickle.loads(pickle.dumps(done))  # noqa: S301
    assert "model" in vars(found)
    assert torch.equal(found.model.ablated(x, {"embed": [4]}), done.model.ablated(x, {"embed": [4]}))


def test_nothing_that_an_opened_model_gives_asks_for_gradients_until_it_is_told_to(done: Run) -> None:
    model, x = done.model_at(20), 0.75 * torch.eye(5)
    model.causal_importances(x)["embed"].lower.numpy()
    model.pieces("embed").V.numpy()
    model.weight_delta("embed").numpy()
    model.ablated(x, {"embed": [0]}).numpy()
    saved = model.trainable_state()
    model.requires_grad_()
    asking = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert asking == set(saved) == set(model.trainable_state())
    assert not any(name.startswith("target.") for name in asking)
    model.ablated(x, {"embed": [0]}).sum().backward()
    assert model.pieces("embed").V.grad is not None


def test_in_other_types_a_model_finds_the_same_alive_and_takes_inputs_of_any(done: Run) -> None:
    alive, x = done.alive(), 0.75 * torch.eye(5)
    expected = done.ablated(x, {"embed": [4]})
    other = load_run(done.path)
    other.model.double()
    assert other.alive() == alive
    assert all(found.own == found.other for found in other.match(done).values())
    assert other.alive(x) == done.alive(x)
    torch.testing.assert_close(other.ablated(x, {"embed": [4]}), expected.double(), rtol=1e-4, atol=1e-5)
    other.model.bfloat16()
    assert set(other.alive(x)) == {"embed", "unembed"}
    assert other.effects(x, {"embed": [4]})["embed", 4].mean >= 0


def test_the_effect_of_several_at_once_is_that_of_the_output_without_all_of_them(done: Run) -> None:
    x = 0.75 * torch.eye(5)
    chosen = torch.zeros(20, dtype=torch.bool)
    chosen[[0, 4]] = True
    effect = done.joint_effect(x, {"embed": chosen, "unembed": 3})
    assert effect.subcomponents == {"embed": [0, 4], "unembed": [3]}
    without = done.ablated(x, {"embed": [0, 4], "unembed": [3]})
    expected = (without - done.model.target(x)).square().mean(-1)
    torch.testing.assert_close(effect.divergence, expected, rtol=1e-4, atol=1e-8)
    assert effect.mean == pytest.approx(float(expected.mean()), rel=1e-4)
    assert done.joint_effect(x, {}).mean == pytest.approx(0, abs=1e-12)


def test_an_evaluation_gives_what_the_run_measured_and_writes_nothing(done: Run) -> None:
    def files() -> dict[Path, tuple[int, int]]:
        stats = {path: path.stat() for path in done.path.rglob("*")}
        return {path: (stat.st_mtime_ns, stat.st_size) for path, stat in stats.items()}

    before = files()
    found = done.evaluate()
    (last,) = [row for row in done.metrics if row["split"] == "eval" and row["step"] == 20]
    measured = {name: value for name, value in last.items() if "/" in name}
    assert {"loss/total", "l0/embed", "alive/embed", "recovery/mmcs"} <= set(measured)
    assert found == pytest.approx(measured, rel=1e-5)
    assert done.evaluate(batches=3)["l0/embed"] != found["l0/embed"]
    assert done.at(10).evaluate()["loss/total"] != found["loss/total"]
    assert files() == before


def test_matched_are_the_pairs_whose_causal_importances_sum_to_the_most(done: Run) -> None:
    g = done.model.causal_importances(0.75 * torch.eye(5))["embed"].lower
    found = done.matched()["embed"]
    assert len(set(found)) == 5
    own = sum(float(g[feature, c]) for feature, c in enumerate(found))
    best = max(
        sum(float(g[feature, c]) for feature, c in enumerate(order))
        for order in itertools.permutations(done.alive(torch.eye(5) * 0.75)["embed"], 5)
    )
    assert own == pytest.approx(best, abs=1e-5)


def test_at_a_step_the_model_is_that_of_its_checkpoint(done: Run) -> None:
    state = done.at(10).model.trainable_state()
    assert all(torch.equal(state[name], value) for name, value in done.model_at(10).trainable_state().items())
    with pytest.raises(ConfigError, match=re.escape("step: got 15;")):
        done.at(15)


def test_as_many_are_alive_as_the_evaluation_counted_and_on_a_batch_those_it_needs(done: Run) -> None:
    assert {site: len(own) for site, own in done.alive().items()} == done.summary["alive"]
    x = 0.75 * torch.eye(5)
    g = done.model.causal_importances(x)["embed"].lower
    expected = [c for c in range(20) if any(g[row, c] > done.config.eval.ci_threshold for row in range(5))]
    assert done.alive(x)["embed"] == expected


def test_a_run_matches_itself_and_an_earlier_step_by_hand(done: Run) -> None:
    itself = done.match(done)
    assert all(found.own == found.other for found in itself.values())
    assert itself["embed"].cosines == pytest.approx([1] * len(done.alive()["embed"]))
    x = torch.rand(50, 5)
    earlier = done.at(10)
    found = done.match(earlier, x)["embed"]
    assert set(found.own) <= set(done.alive(x)["embed"])
    assert set(found.other) <= set(earlier.alive(x)["embed"])
    c, d = found.own[0], found.other[0]
    one, other = (
        torch.outer(pieces.V[:, n], pieces.U[n]).detach().flatten()
        for pieces, n in ((done.model.pieces("embed"), c), (earlier.model.pieces("embed"), d))
    )
    assert found.cosines[0] == pytest.approx(float(torch.cosine_similarity(one, other, dim=0)), abs=1e-5)


def test_effects_of_a_toy_are_squared_errors_of_its_ablated_outputs(done: Run) -> None:
    x = 0.75 * torch.eye(5)
    (effect,) = done.effects(x, {"embed": [4]})
    with torch.no_grad():
        expected = (done.model.ablated(x, {"embed": [4]}) - done.model.target(x)).square().mean(-1)
    torch.testing.assert_close(effect.divergence, expected, rtol=1e-4, atol=1e-8)
    taken = {(own.site, own.index) for own in done.effects(x)}
    assert taken == {(site, c) for site, own in done.alive(x).items() for c in own}


def test_a_run_without_text_says_that_it_has_no_tokenizer(done: Run) -> None:
    look: Any
    for look in (lambda: done.tokenizer, lambda: done.prompt("a"), lambda: done.effects("a")):
        with pytest.raises(
            ConfigError, match=r"tokenizer: the run .* has none; give token ids or other inputs"
        ):
            look()


def test_a_run_of_other_sites_is_refused(done: Run, toy: Toy) -> None:
    other = decompose(toy("model=tms_5-2-id", "decomposition=tms_5-2-id"))
    with pytest.raises(
        ValueError, match=r"other: got a run of the sites embed, hidden\.0, unembed, must have"
    ):
        done.match(other)


def test_with_hooks_a_batch_is_looked_at_and_the_runs_own_data_are_not(done: Run) -> None:
    model, x = done.model, 0.75 * torch.eye(5)
    with model.hooked({"embed": lambda module, inputs, output: 0 * output}):
        assert done.effects(x, {"embed": [4]})["embed", 4].mean == 0
        assert done.alive(x)["embed"]
        for measure in (done.alive, done.evaluate, done.matched):
            with pytest.raises(
                ValueError, match=r"model\.hooked: .* leave the block, or give what to look at"
            ):
                measure()
    assert done.effects(x, {"embed": [4]})["embed", 4].mean > 0


def test_an_evaluation_is_of_the_checkpoint_that_the_model_is_from_also_when_a_newer_one_has_come(
    done: Run, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(done.path, tmp_path / "run"))
    newest = folder / "checkpoints" / "step_20"
    newest.rename(tmp_path / "step_20")
    run = load_run(folder)
    assert run.model is not None
    (tmp_path / "step_20").rename(newest)
    assert run.steps == [10, 20]
    assert run.evaluate() == done.at(10).evaluate()
