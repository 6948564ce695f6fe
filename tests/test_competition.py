"""Runs that are stopped or killed while they choose among initialisations end as those that were not."""

import dataclasses
import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.ranks import play, result_in

from spd_hydra import competition
from spd_hydra.checkpoint import load_newest
from spd_hydra.config import RunConfig
from spd_hydra.run import run
from spd_hydra.saved_config import load_config
from spd_hydra.section import ConfigError

Toy = Callable[..., RunConfig]
Moment = dict[str, Any]
STEPS = 12
CHOICE = "train.restarts={number:3,fraction:0.25}"  # 3 of 3 steps each, then 2 of 3 more
ALL_STEPS = 3 * 3 + 2 * 3 + (STEPS - 6)


def words_for(cache: Path, *more: str) -> list[str]:
    cadence = [f"train.steps={STEPS}", "train.checkpoint_every=100", "train.log_every=2", "eval.every=4"]
    return ["debug=smoke", f"cache_dir={cache}", "model.training.batch_size=64", *cadence, CHOICE, *more]


@pytest.mark.slow
def test_a_choice_may_be_stopped_or_killed_at_any_moment(tmp_path: Path, target_cache: Path) -> None:
    words = words_for(target_cache)
    play(tmp_path, words, {"undisturbed": []}, size=1)
    operations = int((tmp_path / "runs" / "files_0").read_text())
    rng = random.Random(0)

    def moment(number: int, what: str = "steps", **more: Any) -> Moment:
        return {"rank": 0, what: number, "signal": signal.SIGKILL} | more

    asked = {"signal": signal.SIGUSR2, "requeues": True}
    # Requeued before a choice would be done at once, as by time limits that are too short for it.
    histories: dict[str, list[Moment]] = {"requeued": [moment(4, **asked) for _ in range(4)]}
    histories["killed between steps"] = [moment(5), moment(4), moment(2)]
    for number in range(4):
        files = [rng.randint(15, operations * 3 // 4) for _ in range(2)]
        histories[f"killed in files {number}"] = [moment(file, "files") for file in files]
    played = play(tmp_path, words, histories, size=1)
    assert [attempt["codes"] for attempt in played["requeued"]] == [[75]] * 4 + [[0]]
    told = [attempt["status"]["error"] for attempt in played["requeued"][:4]]
    # 16 steps: the choice takes 15, and of each attempt none is done again.
    assert told == [
        "stopped by SIGUSR2, saved at step 1 of initialisation 2 of 3",
        "stopped by SIGUSR2, saved at step 2 of initialisation 3 of 3",
        *told[2:3],
        "stopped by SIGUSR2, saved at step 7",
    ]
    assert "saved at step 6 of initialisation" in told[2]
    undisturbed = result_in(tmp_path / "runs" / "undisturbed")
    for name, moments in histories.items():
        assert result_in(tmp_path / "runs" / name) == undisturbed, moments
        assert not [*(tmp_path / "runs" / name).rglob("restarts")], name


@pytest.mark.slow
def test_ranks_that_share_the_optimiser_out_go_on_with_their_choice(
    tmp_path: Path, target_cache: Path
) -> None:
    words = words_for(target_cache, "train.shard=optimizer", "loss.persistent_pgd_recon.coeff=0.5")
    histories: dict[str, list[Moment]] = {
        "undisturbed": [],
        "stopped": [{"rank": 1, "steps": 1, "signal": signal.SIGTERM}],
        "killed": [
            {"rank": 0, "steps": 8, "signal": signal.SIGKILL},
            {"rank": 1, "steps": 5, "signal": signal.SIGKILL},
        ],
    }
    played = play(tmp_path, words, histories)
    assert played["stopped"][0]["codes"] == [143, 143]
    assert "of initialisation" in played["stopped"][0]["status"]["error"]
    undisturbed = result_in(tmp_path / "runs" / "undisturbed")
    for name in ("stopped", "killed"):
        assert result_in(tmp_path / "runs" / name) == undisturbed, name


# ---- in this process -----------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends a run as a signal that cannot be heard does."""


def killed_after(number: int, config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run that was killed after so many states of its choice."""
    save, saved = competition.save, []

    def counted(*arguments: Any, **more: Any) -> None:
        save(*arguments, **more)
        saved.append(more["parts"])
        if len(saved) == number:
            raise Killed

    before = {*Path(config.out_dir).glob("*/*")}
    with monkeypatch.context() as patch:
        patch.setattr(competition, "save", counted)
        with pytest.raises(Killed):
            run(config)
    (directory,) = {*Path(config.out_dir).glob("*/*")} - before
    return directory


def resumed(directory: Path) -> RunConfig:
    return dataclasses.replace(load_config(directory / "config.yaml"), resume=str(directory))


@pytest.mark.slow
def test_replicas_that_are_killed_while_they_choose_go_on_together(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train.replicas=2", CHOICE, f"train.steps={STEPS}"]
    whole = run(toy(*words)).run_dir
    assert whole is not None
    broken = killed_after(4, toy(*words), monkeypatch)
    assert [path.name for path in broken.rglob("restarts/*")] == ["step_12"], "one state, of both"
    run(resumed(broken))
    for number in ("0", "1"):
        own, wanted = (load_newest(path / number / "checkpoints") for path in (broken, whole))
        assert own is not None
        assert wanted is not None
        assert own.state["facts"] == wanted.state["facts"]
        for group, tensors in wanted.tensors.items():
            assert own.tensors[group].keys() == tensors.keys()
            assert all(value.equal(own.tensors[group][name]) for name, value in tensors.items())
        assert (broken / number / "metrics.jsonl").read_text() == (
            whole / number / "metrics.jsonl"
        ).read_text()
    assert not [*broken.rglob("restarts")]


def test_a_configuration_that_was_changed_while_it_chose_is_refused(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = killed_after(1, toy(CHOICE, f"train.steps={STEPS}"), monkeypatch)
    text = (broken / "config.yaml").read_text()
    assert "number: 3" in text
    (broken / "config.yaml").write_text(text.replace("number: 3", "number: 4"))
    status = (broken / "status.json").read_text()
    with pytest.raises(ConfigError, match=r"since the choice among .*\n  train.restarts.number: 3 → 4"):
        run(resumed(broken))
    assert (broken / "status.json").read_text() == status


def test_a_checkpoint_makes_what_is_left_of_a_choice_superfluous(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the checkpoint of the one chosen and the removal of the state."""

    def killed(directory: Any) -> None:
        raise Killed

    config = toy(CHOICE, f"train.steps={STEPS}")
    with monkeypatch.context() as patch:
        patch.setattr(competition, "remove", killed)
        with pytest.raises(Killed):
            run(config)
    (broken,) = Path(config.out_dir).glob("*/*")
    assert (broken / "restarts").is_dir()
    assert [path.name for path in (broken / "checkpoints").iterdir()] == ["step_6"]
    copy = broken.with_name("copy")
    shutil.copytree(broken, copy)
    shutil.rmtree(copy / "restarts")
    for path in (broken, copy):
        run(resumed(path))
        assert not (path / "restarts").exists()
    rows = [json.loads(line) for line in (broken / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["split"] == "train"]
    assert steps == sorted(set(steps))
    assert (broken / "metrics.jsonl").read_text() == (copy / "metrics.jsonl").read_text()
