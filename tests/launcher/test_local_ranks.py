"""Further ranks of a run on this machine live and die with the process that the person sees."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.ranks import directory_in, status_of

from spd_hydra.launcher.local_ranks import local_ranks

# What every rank does: one small run. Rank 1 gets the words from its standard input.
WORK = """
import json, os, signal, sys
import spd_hydra.pipeline, spd_hydra.result, spd_hydra.run
from spd_hydra.composition import compose
from spd_hydra.trainer import Trainer
spd_hydra.pipeline.draw_all = spd_hydra.result.draw_all = lambda *arguments: []
rank = int(os.environ.get("RANK", "0"))
def work(words):
    exec(os.environ.get("DISTURB", ""), globals())
    return spd_hydra.run.run(compose(words))
"""
LEAD = """
from spd_hydra.launcher.local_ranks import local_ranks
follow = [sys.executable, "-c", os.environ["WORK"] + "work(json.load(sys.stdin))"]
words = json.loads(sys.argv[1])
with local_ranks(2, follow, json.dumps(words).encode()):
    rank = 0
    work(words)
assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"} & os.environ.keys()
"""


def lead(folder: Path, cache: Path, *more: str, disturb: str = "") -> subprocess.Popen[str]:
    words = ["debug=smoke", f"cache_dir={cache}", f"out_dir={folder / 'outputs'}", *more]
    return subprocess.Popen(
        [sys.executable, "-c", WORK + LEAD, json.dumps(words)],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "WORK": WORK, "DISTURB": disturb},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def is_gone(pid: int, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (ProcessLookupError, FileNotFoundError):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.slow
def test_two_ranks_finish_a_run_and_leave_the_environment_as_it_was(
    tmp_path: Path, target_cache: Path
) -> None:
    out, err = (process := lead(tmp_path, target_cache)).communicate(timeout=60)
    assert process.returncode == 0, err
    assert "report.html" in out
    assert status_of(directory_in(tmp_path))["status"] == "done"


@pytest.mark.slow
def test_the_end_of_another_rank_is_told_with_its_signal(tmp_path: Path, target_cache: Path) -> None:
    disturb = """
take_step = Trainer.train_step
def train_step(self):
    if os.environ["RANK"] == "1" and self.step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return take_step(self)
Trainer.train_step = train_step
"""
    began = time.monotonic()
    _, err = (process := lead(tmp_path, target_cache, disturb=disturb)).communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert process.returncode == 1
    assert "rank 1 was killed by SIGKILL" in err
    assert "rank 1 was killed by SIGKILL" in status_of(directory_in(tmp_path))["error"]


def test_a_rank_that_dies_before_they_meet_ends_this_process_with_its_trace(tmp_path: Path) -> None:
    script = (
        "import time\nfrom spd_hydra.launcher import local_ranks as module\nmodule._GRACE_SECONDS = 0.5\n"
    )
    script += "with module.local_ranks(2, ['python3', '-c', 'raise OSError(\"canary 4711\")'], b''):\n"
    script += "    time.sleep(60)\n"
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began < 30
    assert done.returncode == 1
    assert "rank 1 ended with exit code 1, and rank 0 did not notice" in done.stderr
    assert "OSError: canary 4711" in done.stderr


@pytest.mark.slow
def test_the_others_never_outlive_this_process_and_ctrl_c_is_agreed_on(
    tmp_path: Path, target_cache: Path
) -> None:
    words = ["train.steps=100000", "train.checkpoint_every=100000", "train.log_every=5", "eval.every=100000"]
    for number in (signal.SIGINT, signal.SIGKILL):
        folder = tmp_path / number.name
        folder.mkdir()
        process = lead(folder, target_cache, *words)
        deadline = time.monotonic() + 60
        while not any(path.stat().st_size for path in folder.glob("outputs/*/*/metrics.jsonl")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        (other,) = children_of(process.pid)
        process.send_signal(number)
        process.communicate(timeout=60)
        assert is_gone(other)
        status = status_of(directory_in(folder))["status"]
        assert status == ("stopped" if number is signal.SIGINT else "running")


def test_the_payload_comes_on_standard_input_and_logs_are_kept(tmp_path: Path) -> None:
    echo = [sys.executable, "-c", "import os, sys; print(os.environ['RANK'], sys.stdin.read())"]
    with local_ranks(3, echo, b"payload", logs=tmp_path / "logs"):
        assert os.environ["RANK"] == "0"
        assert os.environ["WORLD_SIZE"] == "3"
    assert "WORLD_SIZE" not in os.environ
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert logs == {"rank_1.log": "1 payload\n", "rank_2.log": "2 payload\n"}
