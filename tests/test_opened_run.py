"""Ways to look into an opened run: its name, checkpoints, what is alive, effects, prompts, another run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_hydra import decompose
from spd_hydra.api import Run
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
    assert "step 10 of 20" in repr(done.at(10))


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
