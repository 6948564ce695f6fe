"""A run whose model, tokenizer and text are on this machine asks nobody for anything."""

import json
import logging
import socket
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from tests.data.reader import save_byte_tokenizer
from tests.hub_cache import COMMIT, cached_model
from tests.model.tiny_hf import saved_model, tokens

from spd_hydra import decompose, load_run
from spd_hydra.composition import compose
from spd_hydra.data.tokens import Tokens
from spd_hydra.model.hf import HuggingFace
from spd_hydra.run import run
from spd_hydra.saved_config import load_config


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Who was called on a machine whose network refuses everything, with nothing set that says so."""
    called: list[Any] = []

    def refuse(*args: Any, **options: Any) -> NoReturn:
        called.append(args)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    return called


@pytest.mark.parametrize("own_tokenizer", [True, False])
def test_a_model_of_the_hub_that_is_in_the_cache_is_run_without_asking_the_hub(
    tmp_path: Path, asked: list[Any], own_tokenizer: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for files in ("model", "tokenizer"):
        saved_model("gpt2", tmp_path / files)
        save_byte_tokenizer(tmp_path / files)
        cached_model(tmp_path / "hub", f"owner/{files}", tmp_path / files)
    (tmp_path / "text.txt").write_text("\n\n".join(chr(65 + n % 26) * 9 for n in range(40)))
    words = [
        *("experiment=lm_hf", "task=train_target", "device=cpu", f"out_dir={tmp_path / 'runs'}"),
        *("model.name=owner/model", f"data.name={tmp_path / 'text.txt'}", "data.length=12"),
        *(f"data.cache_dir={tmp_path}", "data.pack=false"),  # the target has no token for an end
        *(() if own_tokenizer else ("data.tokenizer=owner/tokenizer",)),
    ]
    with caplog.at_level(logging.INFO):
        path = run(compose(words)).run_dir
    assert not asked
    assert "Retrying" not in caplog.text
    assert path is not None
    saved = load_config(path / "config.yaml")
    assert isinstance(saved.model, HuggingFace)
    assert isinstance(saved.data, Tokens)
    assert saved.model.revision == COMMIT
    assert saved.data.tokenizer_revision == (None if own_tokenizer else COMMIT)


@pytest.mark.slow
def test_a_run_of_local_files_is_opened_and_analysed_from_another_directory(
    tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_model("gpt2", tmp_path / "here" / "gpt2")
    text = "\n".join(json.dumps({"ids": row}) for row in tokens(rows=40).tolist())
    (tmp_path / "here" / "ids.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path / "here")
    words = [
        *("experiment=lm_hf", "device=cpu", f"out_dir={tmp_path / 'runs'}", "model.name=gpt2"),
        *("model.keep_weights=never", "data.name=ids.jsonl", "data.token_column=ids", "data.length=12"),
        *(f"data.cache_dir={tmp_path}", "data.eval_fraction=0.5", "decomposition.C=3"),
        *("ci_fn.hidden=[4]", "loss=paper/tms_5-2", "train.steps=2", "train.batch_size=4"),
        *("train.compile=false", "train.checkpoint_every=1", "train.restarts.number=1"),
        *("train.faithfulness_warmup.steps=1", "eval.batches=1", "eval.batch_size=4"),
        *("eval.pgd_steps=[]", "eval.ablations=false", "eval.subcomponents=0"),
    ]
    done = decompose(words)
    batch, original = tokens(), done.model(tokens())
    monkeypatch.chdir(tmp_path)
    assert torch.equal(load_run(done.path).model(batch), original)
    decompose(["task=analyse", f"run={done.path}"])
    assert decompose([f"resume={done.path}", "train.steps=3"]).summary["steps"] == 3
