"""A run whose wandb server is dead ends with the numbers of one that has none, hardly later, under one id."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CallAll = Callable[..., list[Any]]


def numbers_of(run: Path) -> dict[str, str]:
    files = [
        run / "metrics.jsonl",
        *run.glob("checkpoints/*/*.safetensors"),
    ]  # not the state, which has times
    return {str(path.relative_to(run)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
def test_a_dead_server_costs_no_number_and_little_time_and_a_resumed_run_keeps_its_id(
    tmp_path: Path, call_all: CallAll
) -> None:
    words = ["debug=smoke", "out_dir=runs", f"cache_dir={tmp_path / 'cache'}", "model.training.batch_size=64"]
    online = [*words, "logger=wandb"]
    dead = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a1" * 20, "HOME": str(tmp_path)}
    without, with_wandb = call_all(
        [{"folder": tmp_path / "without", "words": words}, {"folder": tmp_path / "with", "words": online}],
        **dead,
    )
    assert (without.code, with_wandb.code) == (0, 0), with_wandb.text
    assert with_wandb.text.count("wandb records this run offline: http://127.0.0.1:9 does not answer") == 1
    (plain,), (run,) = (tmp_path / "without" / "runs").glob("*/*"), (tmp_path / "with" / "runs").glob("*/*")
    assert numbers_of(run) == numbers_of(plain)
    assert len(numbers_of(run)) == 5
    print(f"with a dead server {with_wandb.seconds - without.seconds:+.1f} s")
    assert with_wandb.seconds < without.seconds + 30

    identity = json.loads((run / "wandb.json").read_text())["id"]
    (resumed,) = call_all([{"folder": tmp_path, "words": [f"resume={run}", "train.steps=24"]}], **dead)
    assert resumed.code == 0, resumed.text
    records = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert [path.name for path in records] == [f"run-{identity}.wandb"] * 2
