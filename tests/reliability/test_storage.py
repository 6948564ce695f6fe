"""A disk that is full, read-only or gone ends a run at once, in words, and costs no checkpoint."""

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spd_hydra.checkpoint import verify

CallAll = Callable[..., list[Any]]
WORDS = [
    "debug=smoke",
    "model.training.batch_size=64",
    "out_dir=runs",
    "train.steps=12",
    "train.checkpoint_every=3",
    "train.log_every=2",
]
OWN_MOUNTS = ["unshare", "--map-root-user", "--mount"]

pytestmark = pytest.mark.slow


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path, so that every message stands on one line."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def may_mount(folder: Path) -> bool:
    command = [*OWN_MOUNTS, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def require_intact(folder: Path, text: str) -> int:
    """No traceback, no unfinished files, nothing but whole checkpoints; returns their number."""
    assert "Traceback" not in text, text
    assert not [path for path in folder.rglob(".*") if path.name.endswith(".tmp") or ".tmp_" in path.name]
    checkpoints = list(folder.glob("runs/*/*/checkpoints/step_*"))
    assert [verify(path) for path in checkpoints] == [[]] * len(checkpoints)
    return len(checkpoints)


def digests(folder: Path) -> dict[str, str]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def test_a_full_disk_is_one_clear_error_and_every_checkpoint_is_whole(
    folder: Path, call_all: CallAll
) -> None:
    if not may_mount(folder):
        pytest.skip("this user may not mount a small file system")
    sizes = [4096, *range(20_000, 200_000, 40_000)]
    words = [*WORDS, f"cache_dir={folder / 'cache'}"]
    cases = [{"folder": folder / str(size), "words": words, "disk_bytes": size} for size in sizes]
    numbers = set()
    for case, ended in zip(cases, call_all(cases, *OWN_MOUNTS), strict=True):
        copy = case["folder"].with_name(f"{case['folder'].name}.copy")
        assert ended.code == 1
        last = ended.text.strip().splitlines()[-1]
        assert re.match(
            rf"The run failed: cannot write .*{case['folder']}/runs/.*: No space left on device", last
        )
        numbers.add(require_intact(copy, ended.text))
        print(f"{case['disk_bytes']} bytes: ended after {ended.seconds:.1f} s: {last}")
    assert numbers == {0, 1, 2}


def test_files_that_may_not_grow_are_one_clear_error_and_every_checkpoint_is_whole(
    folder: Path, call_all: CallAll
) -> None:
    sizes = [1_000, 4_000, 12_000, 40_000]  # of the files of configuration, weights, optimiser, report
    words = [*WORDS, f"cache_dir={folder / 'cache'}"]
    cases = [{"folder": folder / str(size), "words": words, "file_bytes": size} for size in sizes]
    numbers = []
    for case, ended in zip(cases, call_all(cases), strict=True):
        assert ended.code == 1
        last = ended.text.strip().splitlines()[-1]
        assert re.match(rf"The run failed: cannot write .*{case['folder']}/runs/.*: File too large", last)
        numbers.append(require_intact(case["folder"], ended.text))
    assert numbers == [0, 0, 0, 2]


def test_a_directory_that_may_not_be_written_is_named_before_anything_is_trained(
    folder: Path, call_all: CallAll
) -> None:
    (folder / "closed").mkdir(mode=0o555)
    words = [*WORDS, f"cache_dir={folder / 'cache'}"]
    (done,) = call_all([{"folder": folder, "words": words}])
    assert done.code == 0, done.text
    (run,) = (folder / "runs").glob("*/*")
    for path in [*run.rglob("*"), run]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = digests(run)
    new, resumed = call_all(
        [
            {"folder": folder, "words": [*words, "out_dir=closed"], "obeys_modes": True},
            {"folder": folder, "words": [f"resume={run}", "train.steps=20"], "obeys_modes": True},
        ]
    )
    for ended, what in (
        (new, "make the run directory .*closed/tms_5-2/"),
        (resumed, f"write to the .* {run}"),
    ):
        assert ended.code == 1
        last = ended.text.strip().splitlines()[-1]
        assert re.match(rf"The run failed: cannot {what}.*: Permission denied\..*out_dir=", last), ended.text
        assert ended.text.strip() == last, "nothing was trained"
        print(f"ended after {ended.seconds:.1f} s: {last}")
    assert digests(run) == before
    assert list((folder / "closed").iterdir()) == []
    for path in [run, *run.rglob("*")]:
        path.chmod(0o755)


def test_a_directory_that_vanishes_ends_the_run_and_does_not_come_back(
    folder: Path, call_all: CallAll
) -> None:
    words = [*WORDS, f"cache_dir={folder / 'cache'}", "train.steps=20000", "eval.every=1000000"]
    often, never = "=10", "=1000000"
    cases = []
    for name, log, save in (("both", often, often), ("saves", never, often), ("logs", often, never)):
        cadence = [f"train.log_every{log}", f"train.checkpoint_every{save}"]
        first = "checkpoints/step_*" if save == often else "metrics.jsonl"
        case = {"folder": folder / name, "words": [*words, *cadence], "vanishes": f"runs/*/*/{first}"}
        cases.append(case)
    for case, ended in zip(cases, call_all(cases), strict=True):
        assert ended.code == 1
        assert "Traceback" not in ended.text
        last = ended.text.strip().splitlines()[-1]
        expected = rf"The run failed: cannot write .*{case['folder']}/runs/.*: No such file or directory"
        assert re.match(expected, last), last
        assert list(folder.glob("*/runs/*/*")) == []
        print(f"ended {ended.seconds:.2f} s after its directory was removed: {last}")


@pytest.mark.parametrize("launcher", ["local", "local_parallel"])
def test_a_sweep_on_a_full_disk_is_told_with_the_path_and_shows_no_job_as_missing(
    folder: Path, call_all: CallAll, launcher: str
) -> None:
    if not may_mount(folder):
        pytest.skip("this user may not mount a small file system")
    words = ["-m", *WORDS, f"cache_dir={folder / 'cache'}", "seed=0,1", f"launcher={launcher}"]
    cases = [{"folder": folder / str(size), "words": words, "disk_bytes": size} for size in (4096, 40960)]
    for case, ended in zip(cases, call_all(cases, *OWN_MOUNTS), strict=True):
        assert ended.code in {1, 2, 3}
        assert "Traceback" not in ended.text, ended.text
        assert re.search(rf"cannot .*{case['folder']}/runs/sweeps/.*: No space left on device", ended.text)
        if "  job  setting" in ended.text:
            table = ended.text[ended.text.index("  job  setting") :].splitlines()
            assert [line.split()[2] for line in table[2:4]] == ["failed", "failed"]
        assert ": None" not in ended.text
