"""When every checkpoint is damaged, `spd-run resume=` fails and every byte of the run stays as it was."""

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CallAll = Callable[..., list[Any]]


def flip_one_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: os.truncate(path, 0),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one bit flipped": flip_one_bit,
    "missing": lambda path: path.unlink(),
}


def digests(folder: Path) -> dict[str, str]:
    """Of every file but the lock, which says who held it last."""
    found = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.slow
def test_without_a_whole_checkpoint_a_resume_fails_and_changes_nothing(
    tmp_path: Path, call_all: CallAll
) -> None:
    words = [
        "debug=smoke",
        "out_dir=runs",
        f"cache_dir={tmp_path / 'cache'}",
        "model.training.batch_size=64",
        "eval.figures=false",
    ]
    (done,) = call_all([{"folder": tmp_path / "origin", "words": words}])
    assert done.code == 0, done.text
    (origin,) = (tmp_path / "origin" / "runs").glob("*/*")
    files = sorted(path.name for path in (origin / "checkpoints" / "step_20").iterdir())
    cases, before = [], []
    for damage, act in DAMAGES.items():
        for file in files:
            folder = tmp_path / f"{damage} {file}"
            shutil.copytree(origin, folder / "run")
            for path in folder.glob(f"run/checkpoints/*/{file}"):
                act(path)
            cases.append({"folder": folder, "words": ["resume=run", "train.steps=24", "train.log_every=1"]})
            before.append(digests(folder))
    all_ended = call_all(cases)
    for case, bytes_before, ended in zip(cases, before, all_ended, strict=True):
        assert ended.code == 1, ended.text
        assert "checkpoints has 2 checkpoints and none is whole" in ended.text
        assert "Traceback" not in ended.text
        assert digests(case["folder"]) == bytes_before, case["folder"]
    print(f"{len(cases)} damaged runs refused, the slowest after {max(e.seconds for e in all_ended):.1f} s")
