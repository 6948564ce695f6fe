"""A model of transformers on tokenised text: killed and resumed, shared by two ranks, fed by a stream."""

import dataclasses
import html
import json
import signal
from pathlib import Path

import pytest
import torch
from tests.model.tiny_hf import LENGTH, VOCAB, saved_model
from tests.ranks import begin, ends, play, result_in

from spd_hydra.api import load_run
from spd_hydra.composition import compose
from spd_hydra.run import run
from spd_hydra.saved_config import load_config
from spd_hydra.section import ConfigError

STEPS = 8
NOTE = (
    "data.streaming: not exactly resumable; a run that is resumed reads the text again, and sees the same "
    "rows only if the source gives the same text in the same order"
)
# Writes down which places of the stream of rows each training step asks for.
RECORD = """
import json
from spd_hydra.data.token_batches import TokenBatches
read, step_on, training = TokenBatches.__call__, Trainer.train_step, []
def recording_step(self):
    training.append(self.step)
    result = step_on(self)
    training.pop()
    return result
def recording_read(self, key, rows):
    if training:
        with open(f"places_{rank}", "a") as file:
            file.write(json.dumps([training[-1], rows.tolist()]) + chr(10))
    return read(self, key, rows)
TokenBatches.__call__, Trainer.train_step = recording_read, recording_step
"""


def words_for(folder: Path, *more: str) -> list[str]:
    """A short run on a model and on token ids that are made here."""
    if not (folder / "model").exists():
        saved_model("gpt2", folder / "model")
        rows = [{"input_ids": [(7 * start + n) % VOCAB for n in range(40)]} for start in range(60)]
        (folder / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        *("experiment=lm_hf", f"model.name={folder / 'model'}", f"data.name={folder / 'ids.jsonl'}"),
        *(f"data.length={LENGTH}", "data.eval_fraction=0.3", f"cache_dir={folder / 'cache'}", "device=cpu"),
        *("decomposition.C=4", "ci_fn=mlp", "ci_fn.hidden=4", "train.restarts.number=1"),
        *(f"train.steps={STEPS}", "train.batch_size=6", "train.checkpoint_every=3", "train.log_every=2"),
        *("train.compile=false", "train.faithfulness_warmup.steps=2", "eval.batches=1", "eval.batch_size=6"),
        *("eval.every=4", *more),
    ]


@pytest.mark.slow
def test_a_run_that_is_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    killed = {"rank": 0, "signal": signal.SIGKILL, "steps": 5}
    played = play(tmp_path, words_for(tmp_path), {"undisturbed": [], "killed": [killed]}, size=1)
    assert [attempt["codes"] for attempt in played["killed"]] == [[-signal.SIGKILL], [0]]
    undisturbed = result_in(tmp_path / "runs" / "undisturbed")
    assert undisturbed["summary"]["steps"] == STEPS
    assert result_in(tmp_path / "runs" / "killed") == undisturbed


@pytest.mark.slow
def test_two_ranks_read_different_rows_and_together_those_of_one_process(tmp_path: Path) -> None:
    places = []
    for size in (1, 2):
        folder = tmp_path / str(size)
        folder.mkdir()
        done = ends(begin(folder, words_for(tmp_path), size=size, disturb=RECORD), timeout=300)
        assert [ended.code for ended in done] == [0] * size, done
        places.append([read_in(folder / f"places_{rank}") for rank in range(size)])
    (alone,), (first, second) = places
    assert [step for step, _ in alone] == list(range(STEPS))
    assert [row for _, rows in alone for row in rows] == list(range(6 * STEPS))  # no row twice in an epoch
    for (step, whole), (_, one), (_, other) in zip(alone, first, second, strict=True):
        assert not set(one) & set(other), step
        assert sorted(one + other) == sorted(whole), step


def read_in(path: Path) -> list[tuple[int, list[int]]]:
    return [(step, rows) for step, rows in map(json.loads, path.read_text().splitlines())]


@pytest.mark.slow
def test_a_stream_is_said_to_be_not_exactly_resumable_wherever_a_run_is_described(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words_for(tmp_path, "data.streaming=true", f"out_dir={tmp_path / 'outputs'}")
    run(compose(["task=check", *words]))
    assert f"  {NOTE}\n" in capsys.readouterr().out
    outcome = run(compose(words))
    assert outcome.run_dir is not None
    assert f"{NOTE}\n" in capsys.readouterr().out
    assert outcome.summary["notes"] == [NOTE]
    assert f"<b>Warning:</b> {NOTE}" in (outcome.run_dir / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train", "evaluate"])
def test_a_run_does_not_go_on_with_other_text_and_a_touched_file_is_no_other(
    tmp_path: Path, part: str
) -> None:
    words = words_for(tmp_path)
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"input_ids": [' + ", ".join("3" for _ in range(40)) + "]}\n")
    words += [f"data.eval_name={held_out}", f"out_dir={tmp_path / 'outputs'}"]
    config = compose([*words, "eval.batch_size=1"])
    done = run(config).run_dir
    assert done is not None
    saved = load_config(done / "config.yaml")
    file = {"train": tmp_path / "ids.jsonl", "evaluate": held_out}[part]
    text = file.read_text()
    file.write_text(text.replace("3", "4", 1))
    longer = dataclasses.replace(
        saved, resume=str(done), train=dataclasses.replace(saved.train, steps=STEPS + 1)
    )
    with pytest.raises(ConfigError) as caught:
        run(longer, saved=saved)
    assert str(caught.value) == (
        f"data: the rows to {part} on are not those of step_{STEPS}: the text was changed since; "
        "put it back, or start a new run"
    )
    results = (done / "summary.json").read_text()
    with pytest.raises(ConfigError, match=rf"^data: the rows to {part} on are not those of step_{STEPS}"):
        run(compose(["task=analyse", f"run={done}"]))
    assert (done / "summary.json").read_text() == results
    file.write_text(text)
    assert run(longer, saved=saved).summary["steps"] == STEPS + 1


@pytest.mark.slow
def test_a_loaded_model_takes_padding_also_where_the_run_had_none(tmp_path: Path) -> None:
    done = run(compose(words_for(tmp_path, "train.steps=1", f"out_dir={tmp_path / 'outputs'}"))).run_dir
    assert done is not None
    model = load_run(done).model
    short = torch.arange(5)[None]
    padded = torch.cat([short, torch.full((1, 3), -1)], dim=1)
    torch.testing.assert_close(model(padded)[:, :5], model(short), rtol=0, atol=1e-5)
    alone, beside = (model.causal_importances(tokens) for tokens in (short, padded))
    for site, g in alone.items():
        torch.testing.assert_close(beside[site].lower[:, :5], g.lower, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_that_measured_held_out_rows_several_times_says_so_in_its_results(tmp_path: Path) -> None:
    words = words_for(tmp_path, "eval.batch_size=300", "train.steps=2", f"out_dir={tmp_path / 'outputs'}")
    outcome = run(compose(words))
    (note,) = outcome.summary["notes"]
    assert note.startswith("data: only ")
    assert "rows are measured several times" in note
    assert outcome.run_dir is not None
    assert note in html.unescape((outcome.run_dir / "report.html").read_text())


def test_a_stream_is_not_exactly_resumable_and_not_compared_with_data_to_evaluate_on(tmp_path: Path) -> None:
    assert compose(words_for(tmp_path)).data.notes() == []
    assert compose(words_for(tmp_path, "data.streaming=true")).data.notes() == [NOTE]
    (tmp_path / "val.jsonl").write_text('{"input_ids": [1, 2]}\n')
    words = words_for(tmp_path, "data.streaming=true", f"data.eval_name={tmp_path / 'val.jsonl'}")
    (note,) = compose(words).data.notes()
    assert note == f"{NOTE}; whether documents to evaluate on are also trained on is not checked"
