"""`task=prefetch`: what it fetches and says, and that a run afterwards finds it."""

import json
from pathlib import Path

import pytest
from tests.model.tiny_hf import VOCAB, saved_model

from spd_hydra.composition import compose
from spd_hydra.run import run
from spd_hydra.section import ConfigError


def test_a_toy_needs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(compose(["task=prefetch", f"out_dir={tmp_path}"]))
    assert outcome.summary == {"prefetched": []}
    assert "tms_5-2: nothing has to be fetched" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_model_and_tokens_of_local_files_are_named_with_where_they_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_model("llama", tmp_path / "model")
    rows = [{"ids": [number % VOCAB for number in range(start, start + 20)]} for start in range(30)]
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [
        "experiment=lm_hf",
        f"model.name={tmp_path / 'model'}",
        f"data.name={tmp_path / 'ids.jsonl'}",
        "data.token_column=ids",
        "data.length=8",
        "data.eval_fraction=0.3",
        f"cache_dir={tmp_path / 'cache'}",
    ]
    run(compose(["task=prefetch", *words]))
    told = capsys.readouterr().out
    assert f"model {tmp_path / 'model'}: a local directory, nothing to fetch" in told
    assert f"data {tmp_path / 'ids.jsonl'}: {tmp_path / 'ids.jsonl'}" in told
    (directory,) = (path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())
    assert "rows of 8 to train on" in told
    assert str(directory) in told
    (tmp_path / "ids.jsonl").touch()  # not read again: the run finds the rows by the file's time
    assert (directory / "train.bin").stat().st_size > 0


def test_a_dataset_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match=r"data.name"):
        compose(["task=prefetch", "experiment=lm_hf", "model.name=x"])
