"""Several ranks do one run: the numbers of one process, and one end for all of them, whatever happens."""

import json
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.ranks import at_step, begin, directory_in, ends, play, result_in, rows_of, status_of

STEPS = 12
Moment = dict[str, Any]


def words_for(cache: Path, *more: str) -> list[str]:
    cadence = [f"train.steps={STEPS}", "train.checkpoint_every=3", "train.log_every=2", "eval.every=4"]
    return ["debug=smoke", f"cache_dir={cache}", "model.training.batch_size=64", *cadence, *more]


# ---- the same numbers ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_ranks_do_what_one_process_does(tmp_path: Path, target_cache: Path) -> None:
    words = words_for(
        target_cache,
        "train.steps=100",
        "train.restarts={number:2,fraction:0.3}",
        "train.batch_size=63",
        "eval={every:50,batches:2,batch_size:65}",
        "loss.importance_minimality.beta=0.5",
    )
    results = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        done = ends(begin(folder, words, size=size))
        assert [ended.code for ended in done] == [0] * size, done
        assert all(not ended.out and not ended.err for ended in done[1:]), "rank 0 alone speaks"
        results.append(directory_in(folder))
    one, two = results
    for name in ("model", "optimizer"):
        expected = load_file(one / "checkpoints" / "step_100" / f"{name}.safetensors")
        found = load_file(two / "checkpoints" / "step_100" / f"{name}.safetensors")
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    expected_rows, found_rows = rows_of(one), rows_of(two)
    assert {row["split"] for row in found_rows} == {"train", "eval"}
    for expected_row, found_row in zip(expected_rows, found_rows, strict=True):
        assert found_row.pop("split") == expected_row.pop("split")
        assert found_row == pytest.approx(expected_row, rel=1e-4, abs=1e-6)
    summaries = [json.loads((directory / "summary.json").read_text()) for directory in results]
    for key in ("solved", "strict", "checks", "thresholds", "alive"):
        assert summaries[0][key] == summaries[1][key]
    assert summaries[0]["restarts"]["chosen"] == summaries[1]["restarts"]["chosen"]


# ---- killed, and gone on with --------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_that_are_killed_at_any_moment_and_resumed_end_with_the_same_bits(
    tmp_path: Path, target_cache: Path
) -> None:
    words = words_for(target_cache)
    play(tmp_path, words, {"undisturbed": []})
    operations = int((tmp_path / "runs" / "files_0").read_text())
    rng = random.Random(0)

    def of_steps() -> Moment:
        return {"rank": rng.randrange(2), "steps": rng.randint(1, 5), "signal": signal.SIGKILL}

    def of_files() -> Moment:  # the first ones are those of opening; later attempts need fewer
        return {"rank": 0, "files": rng.randint(10, operations // 3), "signal": signal.SIGKILL}

    histories = {f"in_steps_{number}": [of_steps(), of_steps()] for number in range(2)}
    histories |= {f"while_writing_{number}": [of_files(), of_files()] for number in range(2)}
    histories |= {f"both_{number}": [of_files(), of_steps(), of_files()] for number in range(2)}
    played = play(tmp_path, words, histories)
    codes = [attempt["codes"] for attempts in played.values() for attempt in attempts]
    kills = sum(-signal.SIGKILL in own for own in codes)
    print(f"{kills} kills in {len(histories)} histories")
    assert kills >= 11  # of 14; an attempt may be done before its moment comes
    undisturbed = result_in(tmp_path / "runs" / "undisturbed")
    for name, moments in histories.items():
        killed = [own["codes"] for own in played[name] if -signal.SIGKILL in own["codes"]]
        assert all(0 not in codes for codes in killed), played[name]
        assert result_in(tmp_path / "runs" / name) == undisturbed, moments


# ---- asked to stop -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_a_signal_saves_within_a_step_and_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, target_cache: Path, size: int
) -> None:
    words = words_for(target_cache, "train.steps=40", "train.checkpoint_every=40")
    moment = {"rank": size - 1, "steps": 5}
    histories: dict[str, list[Moment]] = {
        "undisturbed": [],
        "SIGINT": [moment | {"signal": signal.SIGINT}],
        "SIGTERM": [moment | {"signal": signal.SIGTERM}],
        "SIGHUP": [moment | {"signal": signal.SIGHUP}],
        "SIGUSR2": [moment | {"signal": signal.SIGUSR2}],
        "requeued": [moment | {"signal": signal.SIGUSR2, "requeues": True}],
    }
    played = play(tmp_path, words, histories, size=size)
    codes = {name: attempts[0]["codes"] for name, attempts in played.items()}
    assert codes == {
        "undisturbed": [0] * size,
        "SIGINT": [130] * size,
        "SIGTERM": [143] * size,
        "SIGHUP": [143] * size,
        "SIGUSR2": [143] * size,
        "requeued": [75] + [0] * (size - 1),  # whoever listened before is called on rank 0, the others end
    }
    assert (tmp_path / "runs" / "requeued" / "requeued").read_text() == "0"
    undisturbed = result_in(tmp_path / "runs" / "undisturbed")
    for name in list(histories)[1:]:
        status = played[name][0]["status"]
        assert status["status"] == "stopped"
        assert f"saved at step {status['step']}" in status["error"]
        # One process asks itself after every step; ranks talk about it now and then.
        assert status["step"] == 5 if size == 1 else 5 <= status["step"] < 40
        assert result_in(tmp_path / "runs" / name) == undisturbed, name


AT_TARGET = """
import threading, time
obtain, find_target = spd_hydra.pipeline.obtain, spd_hydra.pipeline._target
def slow(*arguments):
    time.sleep(2)
    return obtain(*arguments)
def disturbed(*arguments):
    if rank == {rank}:
        threading.Timer(0.5, lambda: {act}).start()
    return find_target(*arguments)
spd_hydra.pipeline.obtain, spd_hydra.pipeline._target = slow, disturbed
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["target", "restarts"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_before_training_ends_all_ranks_and_loses_nothing(
    tmp_path: Path, target_cache: Path, rank: int, where: str
) -> None:
    words = words_for(target_cache, "train.restarts={number:2,fraction:0.9}", "train.steps=60")
    act = "os.kill(os.getpid(), signal.SIGTERM)"
    disturb = AT_TARGET.format(rank=rank, act=act) if where == "target" else at_step(rank, 5, act)
    done = ends(begin(tmp_path, words, disturb=disturb))
    assert [ended.code for ended in done] == [143, 143], done
    status = status_of(directory_in(tmp_path))
    saved = "" if where == "target" else ", saved at step "
    assert status["status"] == "stopped"
    assert status["error"].startswith(f"stopped by SIGTERM{saved}")
    again = ends(begin(tmp_path, [f"resume={directory_in(tmp_path)}"]))
    assert [ended.code for ended in again] == [0, 0], again


# ---- what goes wrong on one ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_number_that_is_not_finite_on_one_rank_stops_all_at_that_step(
    tmp_path: Path, target_cache: Path, rank: int
) -> None:
    words = words_for(target_cache, "train.checkpoint_every=1", "train.keep_checkpoints=20")
    disturb = at_step(rank, 4, "self.updates.components[0].data[0, 0] = float('nan')")
    done = ends(begin(tmp_path, words, disturb=disturb))
    assert [ended.code for ended in done] == [1, 1], done
    directory = directory_in(tmp_path)
    assert "the loss is nan at step 4, in: importance_minimality, stochastic_recon" in done[0].err
    assert status_of(directory)["status"] == "failed"
    assert "at step 4" in status_of(directory)["error"]
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {f"step_{n}" for n in range(1, 5)}
    assert not (directory / "errors").exists(), "all ranks say the same"


ENDS = {
    "raises": ("raise ValueError('canary 4711')", "ValueError: canary 4711"),
    "exits": ("sys.exit(3)", "ended itself with exit code 3"),
    "is killed": ("os.kill(os.getpid(), 9)", "died without a word"),
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ENDS)
@pytest.mark.parametrize("rank", [0, 1])
def test_when_a_rank_ends_all_end_and_the_culprit_is_named(
    tmp_path: Path, target_cache: Path, rank: int, how: str
) -> None:
    act, told = ENDS[how]
    began = time.monotonic()
    done = ends(begin(tmp_path, words_for(target_cache), disturb=at_step(rank, 5, act)), timeout=60)
    assert time.monotonic() - began < 30
    assert all(ended.code != 0 for ended in done), done
    directory = directory_in(tmp_path)
    status = status_of(directory)
    if (rank, how) == (0, "is killed"):
        assert status["status"] == "running"  # as of any process that is killed; nobody else may write it
        return
    assert status["status"] == "failed"
    if rank == 0:
        assert "Connection" not in status["error"]
        return
    assert f"rank 1 {'' if how == 'is killed' else 'failed: '}{told}" in status["error"]
    assert told in done[0].err
    trace = directory / "errors" / "rank_1.txt"
    assert trace.exists() == (how != "is killed")
    if how == "raises":
        assert "disturbed_step" in done[0].err, "the trace is shown"
        assert "disturbed_step" in trace.read_text()


@pytest.mark.slow
def test_an_error_in_opening_ends_all_ranks_with_one_message(tmp_path: Path, target_cache: Path) -> None:
    began = time.monotonic()
    done = ends(begin(tmp_path, words_for(target_cache, "train.batch_size=1")))
    assert time.monotonic() - began < 30
    assert done[0].code == 2
    assert done[1].code != 0
    assert "train.batch_size: got 1, must be ≥ 2, the number of ranks" in done[0].err
    assert "batch_size" not in done[1].err + done[1].out
    assert not (tmp_path / "outputs").exists()
