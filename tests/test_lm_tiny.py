"""A language model from its text to its report: killed and resumed, and shared by two ranks."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.ranks import begin, directory_in, ends, play, result_in, rows_of

from spd_hydra.build import obtain
from spd_hydra.composition import compose

STEPS = 12
SMOOTH = "decomposition.sigmoid=sigmoid"  # the gradient of a hard one jumps, and makes much of a last bit


def words_for(cache: Path, steps: int) -> list[str]:
    return [
        "debug=smoke",
        "experiment=lm_tiny",
        f"cache_dir={cache}",
        "model={vocabulary:300,context:16,d_model:16,d_mlp:24,n_heads:2,training:{batch_size:8}}",
        "decomposition.sites={attention:{C:8},mlp:{C:12}}",
        "ci_fn.hidden=[8]",
        f"train={{steps:{steps},batch_size:6,checkpoint_every:3,log_every:2}}",
        "eval={every:4,batches:2,batch_size:6,subcomponents:2}",
    ]


def test_its_target_is_named_in_the_cache_by_its_data(tmp_path: Path) -> None:
    config = compose([*words_for(tmp_path, STEPS), "target_steps=1"])
    assert not obtain(config, torch.device("cpu")).cached
    assert obtain(config, torch.device("cpu")).cached


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path, target_cache: Path) -> None:
    killed = {"rank": 0, "signal": signal.SIGKILL}
    histories = {"undisturbed": [], "killed": [killed | {"steps": 5}, killed | {"steps": 4}]}
    played = play(tmp_path, words_for(target_cache, STEPS), histories, size=1)
    codes = [attempt["codes"] for attempt in played["killed"]]
    assert codes == [[-signal.SIGKILL], [-signal.SIGKILL], [0]]
    undisturbed = result_in(tmp_path / "runs" / "undisturbed")
    assert undisturbed["summary"]["steps"] == STEPS
    assert {"target", "unmasked", "ci", "zero"} <= set(undisturbed["summary"]["ablations"])
    assert result_in(tmp_path / "runs" / "killed") == undisturbed


@pytest.mark.slow
def test_two_ranks_do_what_one_process_does(tmp_path: Path, target_cache: Path) -> None:
    results = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        words = [*words_for(target_cache, 50), "train.checkpoint_every=50", "eval.every=50", SMOOTH]
        done = ends(begin(folder, words, size=size), timeout=300)
        assert [ended.code for ended in done] == [0] * size, done
        results.append(directory_in(folder))
    one, two = results
    expected = load_file(one / "checkpoints" / "step_50" / "model.safetensors")
    found = load_file(two / "checkpoints" / "step_50" / "model.safetensors")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for expected_row, found_row in zip(rows_of(one), rows_of(two), strict=True):
        assert found_row.keys() == expected_row.keys()
        assert found_row["split"] == expected_row["split"]
        for name, value in expected_row.items():
            if name.startswith("loss/"):
                assert found_row[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
            elif name.startswith("grad_norm/"):  # a sum of terms that nearly cancel
                assert found_row[name] == pytest.approx(value, rel=1e-2), name
            elif name.startswith("l0/"):  # a count above a threshold: the last bit may tip a few of them
                assert found_row[name] == pytest.approx(value, abs=0.1), name
