"""A run that was killed and resumed ends with the bits of one that was not; what a resume refuses."""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from spd_hydra.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from spd_hydra.config import RunConfig, Task, sections
from spd_hydra.result import Outcome
from spd_hydra.run import run
from spd_hydra.run_dir import RunDirectory, RunDirectoryError
from spd_hydra.saved_config import load_config
from spd_hydra.section import ConfigError, Section

Toy = Callable[..., RunConfig]
STEPS, SAVED_EVERY = 12, 3
CADENCE = [
    f"train.steps={STEPS}",
    f"train.checkpoint_every={SAVED_EVERY}",
    "train.log_every=2",
    "eval.every=4",
    "eval.figures=false",
]

# Runs histories, each a list of moments to be killed at. Every attempt is a fork, so that one import of
# torch serves them all. A moment is the number of a training step, or of a file operation inside the run's
# directory (as Python's audit hooks see them: before a file is opened, renamed or removed), of all of them or
# of those of saves.
DRIVER = """
import dataclasses, json, os, signal, sys, traceback
from pathlib import Path
import torch._dynamo  # takes seconds, and every attempt would import it again
from spd_hydra.composition import compose
from spd_hydra.saved_config import load_config
from spd_hydra.run import run
from spd_hydra.trainer import Trainer

out, words, histories = json.loads(sys.argv[1])
step, save = Trainer.train_step, Trainer.save
counted = {"files": 0, "saving": 0, "steps": 0}
doom, saving = {}, []

def count(what):
    counted[what] += 1
    if counted[what] == doom.get(what):
        os.kill(os.getpid(), signal.SIGKILL)

def heard(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and out in str(arguments[0]):
        count("files")
        if saving:
            count("saving")

def marked_save(self):
    saving.append(True)
    save(self)
    saving.pop()

def counting_step(self):
    count("steps")
    return step(self)

sys.addaudithook(heard)
Trainer.train_step, Trainer.save = counting_step, marked_save

def attempt(directory, root):
    if directory is None:
        return run(compose([*words, f"out_dir={root}"]))
    return run(dataclasses.replace(load_config(directory / "config.yaml"), resume=str(directory)))

def begun(root):
    return next((path.parent for path in root.glob("*/*/config.yaml")), None)

for name, moments in histories.items():
    root = Path(out) / name
    killed = 0
    for moment in [*moments, {}]:
        child = os.fork()
        if child == 0:
            try:
                doom.update(moment)
                attempt(begun(root), root)
                (Path(out) / "counted").write_text(json.dumps(counted))
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0 or (code == -signal.SIGKILL and moment), (name, moment, code)
        killed += code != 0
    told = json.loads((Path(out) / "counted").read_text())
    print(json.dumps({"history": name, "killed": killed, "counted": told}), flush=True)
"""

Moment = dict[str, int]


class Played(NamedTuple):
    """How often each history was killed; steps and file operations of the last attempt."""

    killed: dict[str, int]
    counted: dict[str, int]


def play(folder: Path, words: list[str], histories: dict[str, list[Moment]]) -> Played:
    """Run every history below `folder/runs/<name>`."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([str(folder / "runs"), words, histories])],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"history"')]
    assert [row["history"] for row in told] == list(histories)
    return Played({row["history"]: row["killed"] for row in told}, told[-1]["counted"])


def result_of(root: Path) -> dict[str, Any]:
    """Everything that must not depend on how a run came to its end; the directory holds one run."""
    runs = [path.parent for path in root.glob("*/*/summary.json")]
    assert len(runs) == 1, f"{root} holds {len(runs)} finished runs"
    (directory,) = runs
    found: dict[str, Any] = {}
    # Times are those of this machine at that moment, all else is the same to the bit.
    # Older checkpoints than the last are kept longer where the process was killed before it removed them.
    checkpoint = load_checkpoint(directory / "checkpoints" / f"step_{STEPS}")
    for path in sorted(checkpoint.path.glob("*.safetensors")):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert set(found) == {"model.safetensors", "optimizer.safetensors"}
    found["state"] = {key: value for key, value in checkpoint.state.items() if key != "times"}
    found["metrics"] = (directory / "metrics.jsonl").read_text()
    summary = json.loads((directory / "summary.json").read_text())
    for changing in ("seconds", "steps_per_second"):
        del summary[changing]
    del summary["target"]["cached"]
    found["summary"] = summary
    found["status"] = json.loads((directory / "status.json").read_text())["status"]
    return found


def words_for(cache: Path, *more: str) -> list[str]:
    return ["debug=smoke", f"cache_dir={cache}", "model.training.batch_size=64", *CADENCE, *more]


def require_identical(folder: Path, histories: dict[str, list[Moment]]) -> None:
    undisturbed = result_of(folder / "runs" / "undisturbed")
    assert undisturbed["status"] == "done"
    for name in histories:
        assert result_of(folder / "runs" / name) == undisturbed, f"{name}: {histories[name]}"


def killed_everywhere(folder: Path, words: list[str], number: int, seed: int) -> None:
    """Kill at random steps, anywhere and inside saves, up to three times in a row, and compare."""
    counted = play(folder, words, {"undisturbed": []}).counted
    assert counted["steps"] == STEPS
    assert counted["files"] > counted["saving"] > 40
    rng = random.Random(seed)

    def moment() -> Moment:
        what = rng.choice(sorted(counted))
        return {what: rng.randint(1, counted[what])}

    histories = {f"history_{n}": [moment() for _ in range(rng.randint(1, 3))] for n in range(number)}
    killed = play(folder, words, histories).killed
    print(f"{sum(killed.values())} kills in {number} histories")
    assert sum(killed.values()) >= number
    require_identical(folder, histories)


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path, target_cache: Path) -> None:
    words = words_for(target_cache)
    histories: dict[str, list[Moment]] = {
        "undisturbed": [],
        "before the first checkpoint": [{"steps": 3}],
        "between checkpoints": [{"steps": 6}],
        "again and again": [{"steps": 2}, {"steps": 5}, {"steps": 4}],
    }
    played = play(tmp_path, words, histories)
    assert played.killed == {name: len(moments) for name, moments in histories.items()}
    require_identical(tmp_path, histories)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_run_may_be_killed_at_any_moment(tmp_path: Path, target_cache: Path, seed: int) -> None:
    killed_everywhere(tmp_path, words_for(target_cache), number=12, seed=seed)


@pytest.mark.slow
def test_a_compiled_run_that_is_killed_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, target_cache: Path
) -> None:
    words = words_for(target_cache, "train.compile=true", "loss.stochastic_recon_layerwise.coeff=0")
    histories: dict[str, list[Moment]] = {"undisturbed": [], "killed": [{"steps": 5}]}
    assert play(tmp_path, words, histories).killed["killed"] == 1
    require_identical(tmp_path, histories)


PERSISTENT = ["loss.persistent_pgd_recon.coeff=0.5", "loss.persistent_pgd_recon.ascents=2"]


@pytest.mark.slow
def test_with_an_adversary_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(
    tmp_path: Path, target_cache: Path
) -> None:
    words = words_for(target_cache, *PERSISTENT, "train.restarts.number=2", "train.restarts.fraction=0.2")
    histories: dict[str, list[Moment]] = {"undisturbed": [], "killed": [{"steps": 8}, {"steps": 4}]}
    assert play(tmp_path, words, histories).killed["killed"] == 2
    require_identical(tmp_path, histories)
    (directory,) = (path.parent for path in tmp_path.glob("runs/killed/*/*/summary.json"))
    moments = load_checkpoint(directory / "checkpoints" / f"step_{STEPS}").tensors["optimizer"]
    sources = [value for name, value in moments.items() if name.startswith("adversary.sources.")]
    assert len(sources) == 2  # of embed and unembed
    assert all(value.min() >= 0 and value.max() <= 1 for value in sources)


# ---- in this process -----------------------------------------------------------------------------------


@pytest.fixture
def finished(toy: Toy) -> Path:
    return directory_of(run(toy(*CADENCE)))


def directory_of(outcome: Outcome) -> Path:
    assert outcome.run_dir is not None
    return outcome.run_dir


def resumed(directory: Path, **train: Any) -> RunConfig:
    """The saved configuration, to be gone on with."""
    config = dataclasses.replace(load_config(directory / "config.yaml"), resume=str(directory))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train))


def digests(directory: Path) -> dict[str, str]:
    """Of every file but the lock, which says who held it last."""
    found = [path for path in directory.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def unfinished(directory: Path) -> None:
    """Make a finished run look as if it had been killed just before its last checkpoint."""
    for path in (directory / "checkpoints" / f"step_{STEPS}").iterdir():
        path.unlink()
    (directory / "checkpoints" / f"step_{STEPS}").rmdir()
    (directory / "summary.json").unlink()


def test_a_run_killed_between_its_summary_and_its_report_gets_its_report(finished: Path) -> None:
    before = result_of(finished.parents[1])
    status = json.loads((finished / "status.json").read_text())
    (finished / "status.json").write_text(json.dumps(status | {"status": "running"}))
    (finished / "report.html").unlink()
    run(resumed(finished))
    assert (finished / "report.html").exists()
    assert result_of(finished.parents[1]) == before


def test_a_finished_run_has_nothing_left_to_do(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(finished)
    outcome = run(resumed(finished))
    assert "nothing to do" in capsys.readouterr().out
    assert outcome.summary["steps"] == STEPS
    assert digests(finished) == before


def test_a_damaged_newest_checkpoint_is_passed_over_with_a_warning(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = result_of(finished.parents[1])
    (finished / "summary.json").unlink()
    weights = finished / "checkpoints" / f"step_{STEPS}" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    run(resumed(finished))
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert any(f"step_{STEPS} is damaged" in w and f"step_{STEPS - SAVED_EVERY}" in w for w in warnings)
    assert result_of(finished.parents[1]) == before


def test_without_a_whole_checkpoint_nothing_is_restarted_silently(finished: Path) -> None:
    (finished / "summary.json").unlink()
    for weights in finished.glob("checkpoints/*/model.safetensors"):
        weights.write_bytes(b"")
    before = digests(finished)
    with pytest.raises(CheckpointError, match="none is whole"):
        run(resumed(finished))
    assert digests(finished) == before


def test_a_run_without_any_checkpoint_starts_again_without_rows_of_the_first_attempt(finished: Path) -> None:
    before = result_of(finished.parents[1])
    unfinished(finished)
    for path in [*finished.glob("checkpoints/*/*")]:
        path.unlink()
    for path in [*finished.glob("checkpoints/*")]:
        path.rmdir()
    run(resumed(finished))
    assert result_of(finished.parents[1]) == before


def test_more_steps_may_be_asked_for(finished: Path) -> None:
    rows_before = (finished / "metrics.jsonl").read_text()
    outcome = run(resumed(finished, steps=STEPS + 4))
    assert outcome.run_dir == finished
    assert outcome.summary["steps"] == STEPS + 4
    assert load_config(finished / "config.yaml").train.steps == STEPS + 4
    assert load_config(finished / "config.yaml").resume is None
    rows = (finished / "metrics.jsonl").read_text()
    assert rows.startswith(rows_before)
    assert json.loads(rows.splitlines()[-1])["step"] == STEPS + 4


@pytest.mark.parametrize("is_finished", [True, False])
def test_fewer_steps_than_done_are_refused_and_nothing_is_changed(finished: Path, is_finished: bool) -> None:
    saved = load_config(finished / "config.yaml")
    if not is_finished:
        unfinished(finished)
    before = digests(finished)
    done = STEPS if is_finished else STEPS - SAVED_EVERY
    with pytest.raises(ConfigError, match=f"^train.steps: got 5, but the run has done {done}; .*start a new"):
        run(resumed(finished, steps=5), saved=saved)
    assert digests(finished) == before


def test_fewer_steps_than_planned_but_not_done_may_be_asked_for(finished: Path) -> None:
    saved = load_config(finished / "config.yaml")
    unfinished(finished)
    assert run(resumed(finished, steps=STEPS - 2), saved=saved).summary["steps"] == STEPS - 2


def with_times(directory: Path, step: int, seconds: dict[str, float], timed_steps: int) -> None:
    """Save a checkpoint again as if its session had taken so long."""
    path = directory / "checkpoints" / f"step_{step}"
    checkpoint = load_checkpoint(path)
    state = checkpoint.state | {"times": {"seconds": seconds, "timed_steps": timed_steps}}
    save_checkpoint(path.parent, step, checkpoint.tensors, state, keep=9)


def test_seconds_and_speed_are_those_of_all_sessions(finished: Path) -> None:
    alone = json.loads((finished / "summary.json").read_text())["seconds"]
    assert list(alone) == ["target", "compile", "train", "eval", "total"]
    unfinished(finished)
    earlier = {"target": 100.0, "compile": 200.0, "train": 400.0, "eval": 800.0, "total": 2000.0}
    with_times(finished, STEPS - SAVED_EVERY, earlier, timed_steps=STEPS - SAVED_EVERY)
    summary = run(resumed(finished)).summary
    for what, before in earlier.items():
        assert before <= summary["seconds"][what] < before + 60, what
    assert summary["steps_per_second"] == pytest.approx(STEPS / summary["seconds"]["train"])
    saved = load_checkpoint(finished / "checkpoints" / f"step_{STEPS}").state["times"]
    assert saved["timed_steps"] == STEPS
    assert 2000 < saved["seconds"]["total"] <= summary["seconds"]["total"]


def test_a_checkpoint_without_times_is_gone_on_with(finished: Path) -> None:
    unfinished(finished)
    path = finished / "checkpoints" / f"step_{STEPS - SAVED_EVERY}"
    checkpoint = load_checkpoint(path)
    state = {key: value for key, value in checkpoint.state.items() if key != "times"}
    save_checkpoint(path.parent, checkpoint.step, checkpoint.tensors, state, keep=9)
    assert run(resumed(finished)).summary["seconds"]["total"] > 0


def test_logging_evaluation_and_checkpoint_keys_may_change(finished: Path) -> None:
    unfinished(finished)
    config = resumed(finished, log_every=1, keep_checkpoints=7)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, batches=2))
    assert run(config).summary["thresholds"]["positions"] == 2 * config.eval.batch_size


def test_changes_that_make_another_run_are_refused_with_a_list(finished: Path) -> None:
    before = digests(finished)
    config = resumed(finished, lr=0.5, steps=STEPS + 4)
    config = dataclasses.replace(config, seed=7)
    config.decomposition.sites["embed"].C = 33
    with pytest.raises(ConfigError) as raised:
        run(config, saved=load_config(finished / "config.yaml"))
    text = str(raised.value)
    assert "would make it another run" in text
    for line in ("seed: 0 → 7", "train.lr: 0.002 → 0.5", "decomposition.sites.embed.C: 20 → 33"):
        assert f"\n  {line}\n" in text
    assert "train.steps:" not in text
    assert digests(finished) == before


def leaves(section: Section, prefix: str = "") -> Iterator[tuple[Section, str, str]]:
    """Every value of a configuration: the section that holds it, its name there, its full key."""
    for key, inner in sections(section):
        for field in dataclasses.fields(inner):
            value = getattr(inner, field.name)
            if not isinstance(value, Section | dict):
                yield inner, field.name, f"{key}.{field.name}" if key else field.name


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, Enum):
        return next((other for other in type(value) if other is not value), value)
    if isinstance(value, int | float):
        return value + 1
    return [*value, 1] if isinstance(value, list) else f"{value or ''}x"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("seed: 0", "seed: 1", "seed: 0 → 1"),
        ("coeff: 0.006", "coeff: 0.009", "loss.importance_minimality.coeff: 0.006 → 0.009"),
        ("C: 20", "C: 24", "decomposition.sites.embed.C: 20 → 24"),
        ("    batch_size: 64", "", "model.training.batch_size: 64 → "),
    ],
)
def test_a_configuration_that_was_changed_since_the_last_checkpoint_is_refused_and_nothing_is_written(
    finished: Path, old: str, new: str, told: str
) -> None:
    unfinished(finished)
    file = finished / "config.yaml"
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    before = digests(finished)
    with pytest.raises(ConfigError) as caught:
        run(resumed(finished))
    first, *keys, last = str(caught.value).splitlines()
    assert first == f"{file} was changed or cut since step_{STEPS - SAVED_EVERY} was saved:"
    assert any(line.strip().startswith(told) for line in keys)
    assert last == "Put these back to go on, or start a new run"
    assert digests(finished) == before


@pytest.mark.parametrize("name", ["status.json", "summary.json", "environment.json"])
@pytest.mark.parametrize("damaged", ["", "null", "[1]", '{"steps": null', '{"steps": null}'])
def test_a_damaged_file_that_is_written_anew_keeps_no_run_from_going_on(
    finished: Path, name: str, damaged: str
) -> None:
    unfinished(finished)
    (finished / name).write_text(damaged)
    assert run(resumed(finished)).summary["steps"] == STEPS


def warnings_of(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if record.levelname == "WARNING"]


def test_a_resume_with_as_many_ranks_and_threads_on_the_same_device_says_nothing(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unfinished(finished)
    run(resumed(finished))
    assert warnings_of(caplog) == []


@pytest.mark.parametrize(
    ("fact", "before", "again"),
    [
        ("ranks", 2, "launcher.ranks_per_node=2"),
        ("threads", 77, "threads=77"),
        ("device", "cuda", "device=cuda"),
    ],
)
def test_a_resume_whose_steps_round_otherwise_goes_on_with_one_warning(
    finished: Path,
    caplog: pytest.LogCaptureFixture,
    fact: str,
    before: object,
    again: str,
) -> None:
    unfinished(finished)
    path = finished / "checkpoints" / f"step_{STEPS - SAVED_EVERY}"
    checkpoint = load_checkpoint(path)
    machine = {"ranks": 1, "threads": torch.get_num_threads(), "device": "cpu", "replicas": 1}
    assert checkpoint.state["facts"]["machine"] == machine
    facts = checkpoint.state["facts"] | {"machine": machine | {fact: before}}
    save_checkpoint(path.parent, checkpoint.step, checkpoint.tensors, checkpoint.state | {"facts": facts}, 9)
    assert run(resumed(finished)).summary["steps"] == STEPS
    (told,) = warnings_of(caplog)
    assert f"{finished} goes on with other {fact} than before ({fact}: {before} → {machine[fact]})" in told
    assert told.endswith(f"The same: {again}")
    assert load_checkpoint(finished / "checkpoints" / f"step_{STEPS}").state["facts"]["machine"] == machine


def test_threads_may_change_in_a_resume_and_that_is_said(
    finished: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unfinished(finished)
    before = torch.get_num_threads()
    try:
        run(
            dataclasses.replace(resumed(finished), threads=before + 1),
            saved=load_config(finished / "config.yaml"),
        )
    finally:
        torch.set_num_threads(before)
    (told,) = warnings_of(caplog)
    assert f"(threads: {before} → {before + 1})" in told


def test_of_all_keys_only_steps_logging_evaluation_and_places_may_change(finished: Path) -> None:
    keys = [key for _, _, key in leaves(load_config(finished / "config.yaml"))]
    never_saved = ("launcher.", "suite.", "check.", "trust_remote_code", "run_dir")
    keys = [key for key in keys if not key.startswith(never_saved)]
    may_change = set()
    with RunDirectory.open(finished):  # so that a change that is allowed gets no further than the lock
        before = digests(finished)
        for key in keys:
            config = resumed(finished)
            section, name, _ = next(leaf for leaf in leaves(config) if leaf[2] == key)
            old = getattr(section, name)
            setattr(section, name, ["hidden_acts_recon"] if key == "eval.also" else another(old))
            if key in {"resume", "run", "sweep"}:  # for another directory, and for another task
                continue
            with pytest.raises((ConfigError, RunDirectoryError)) as raised:
                run(config, saved=load_config(finished / "config.yaml"))
            if isinstance(raised.value, RunDirectoryError):
                assert "is being written by" in str(raised.value)
                may_change.add(key)
            else:
                assert f"\n  {key}: " in str(raised.value)
        assert digests(finished) == before
    assert may_change == {
        "train.steps", "train.log_every", "train.checkpoint_every", "train.keep_checkpoints", "train.compile",
        "train.accumulate", "train.checkpoint_activations", "train.compile_blocks", "train.cuda_graphs",
        "train.shard",
        "eval.every", "eval.batches", "eval.batch_size", "eval.ci_threshold", "eval.figures_every",
        "eval.figures",
        "eval.ablations", "eval.rounded", "eval.pgd_steps", "eval.pgd_step_size", "eval.subcomponents",
        "eval.contexts", "eval.also",
        "out_dir", "cache_dir", "task", "allow_extra", "objective", "threads", "device",
    }  # fmt: skip
    assert len(keys) - len(may_change) > 60
    print(f"{len(keys)} keys: {len(may_change)} may change")


def test_a_directory_that_is_no_run_is_refused_in_words(toy: Toy, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises((ConfigError, RunDirectoryError), match="no run directory") as raised:
            run(dataclasses.replace(toy(), resume=str(path)))
        assert str(path) in str(raised.value)


def test_a_resumed_run_keeps_its_target_even_without_the_cache(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unfinished(finished)
    monkeypatch.setattr("spd_hydra.pipeline.obtain", lambda *arguments: pytest.fail("a target was trained"))
    before = (finished / "target.safetensors").read_bytes()
    assert run(resumed(finished)).summary["steps"] == STEPS
    assert (finished / "target.safetensors").read_bytes() == before


def test_another_target_in_the_place_of_the_runs_own_is_refused(toy: Toy) -> None:
    words = ["train.steps=6", "train.checkpoint_every=3", "train.keep_checkpoints=1"]
    directory, other = (run(toy(*words, f"seed={seed}")).run_dir for seed in (0, 5))
    assert directory is not None
    assert other is not None
    own = (directory / "target.safetensors").read_bytes()
    (directory / "target.safetensors").write_bytes((other / "target.safetensors").read_bytes())
    again = dataclasses.replace(toy(*words, "train.steps=9"), resume=str(directory))
    refusal = r"target\.safetensors: the target is not that of step_6: it was replaced, or made again"
    before = (directory / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=refusal):
        run(again)
    with pytest.raises(ConfigError, match=refusal):
        run(
            dataclasses.replace(load_config(directory / "config.yaml"), task=Task.analyse, run=str(directory))
        )
    assert (directory / "metrics.jsonl").read_bytes() == before
    (directory / "target.safetensors").write_bytes(own)
    assert run(again).summary["steps"] == 9
