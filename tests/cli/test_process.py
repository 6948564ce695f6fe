"""What only a process of its own can show: the installed command, completion, a real sweep."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SPD_RUN = Path(sys.executable).with_name("spd-run")


def environment(folder: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SPD_", "WANDB_"))}
    return kept | {
        "SPD_CACHE_DIR": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
        "PATH": f"{SPD_RUN.parent}:{kept['PATH']}",
    }


def spd_run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SPD_RUN, *words], cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=300
    )


def bash(folder: Path, script: str) -> list[str]:
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout.split()


def test_help_imports_nothing_slow_besides_torch(tmp_path: Path) -> None:
    call = "from spd_hydra.cli import main; sys.argv = ['spd-run', '--help']; main()"
    code = f"import sys; {call}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True
    )
    loaded = set(done.stdout.splitlines()[-1].split())
    assert "spd_hydra.composer" in loaded
    slow = {"wandb", "transformers", "datasets", "matplotlib", "scipy.optimize", "spd_hydra.run"}
    assert not slow & loaded


@pytest.mark.slow
def test_completion_knows_groups_and_keys(tmp_path: Path) -> None:
    install = 'eval "$(spd-run -sc install=bash)"; complete -p spd-run'
    assert "hydra_bash_completion" in bash(tmp_path, install)
    query = 'export COMP_LINE="spd-run {0}" COMP_POINT=99; spd-run -sc query=bash'
    assert bash(tmp_path, query.format("experiment=tms_40")) == [
        "experiment=tms_40-10",
        "experiment=tms_40-10-id",
    ]
    assert bash(tmp_path, query.format("train.clip")) == ["train.clip_ci_fn=", "train.clip_components="]


@pytest.mark.slow
def test_a_sweep_with_a_diverging_job_finishes_the_others_and_ends_with_3(tmp_path: Path) -> None:
    done = spd_run(tmp_path, "-m", "debug=smoke", "train.lr=1e-3,1e30,1e-2")
    assert done.returncode == 3, done.stderr
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    states = [json.loads((sweep / str(job) / "status.json").read_text())["status"] for job in range(3)]
    assert states == ["done", "failed", "done"]
    table = done.stdout[done.stdout.index("  job  train.lr") :]
    assert [line.split()[:3] for line in table.splitlines()[2:5]] == [
        ["0", "0.001", "done"],
        ["1", "1e+30", "failed"],
        ["2", "0.01", "done"],
    ]
    assert (sweep / "sweep.html").is_file()
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "outputs"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("launcher", ["local", "local_parallel"])
def test_a_full_disk_of_the_log_fails_no_job(tmp_path: Path, launcher: str) -> None:
    words = ["-m", "debug=smoke", f"launcher={launcher}", "seed=0,1", "train.compile=false"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [SPD_RUN, *words], cwd=tmp_path, env=environment(tmp_path), stdout=full, stderr=full, timeout=300
        )
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    states = [json.loads((sweep / str(job) / "status.json").read_text())["status"] for job in range(2)]
    assert (done.returncode, states) == (0, ["done", "done"])
    assert (sweep / "sweep.html").is_file()


@pytest.mark.slow
def test_a_run_is_interrupted_with_130_and_can_go_on(tmp_path: Path) -> None:
    words = ["debug=smoke", "train.steps=100000", "train.checkpoint_every=100000", "train.log_every=20"]
    process = subprocess.Popen(
        [SPD_RUN, *words], cwd=tmp_path, env=environment(tmp_path), stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not any(path.stat().st_size for path in tmp_path.glob("outputs/*/*/metrics.jsonl")):
        assert time.monotonic() < deadline, "no metrics were written"
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    (directory,) = (tmp_path / "outputs" / "tms_5-2").iterdir()
    assert out.rstrip().endswith(str(directory.relative_to(tmp_path)))
    step = max(int(path.name.removeprefix("step_")) for path in (directory / "checkpoints").glob("step_*"))
    resumed = spd_run(tmp_path, f"resume={directory}", f"train.steps={step + 5}")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads((directory / "summary.json").read_text())["steps"] == step + 5
