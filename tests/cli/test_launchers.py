"""What is said, and left undone, before any job is submitted."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]
CANARY = "canary4711canary4711"
ADVICE = "put it into the environment or into .env, from where jobs get it too"


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with no command at all."""
    monkeypatch.setenv("PATH", "")


@pytest.fixture
def with_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which each command of SLURM leaves a file when it is called; that file."""
    folder, called = tmp_path / "bin", tmp_path / "called"
    folder.mkdir()
    for name in ("sbatch", "srun", "squeue", "sacct"):
        (folder / name).write_text(f"#!/bin/sh\necho $0 $* >> {called}\nexit 1\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return called


@pytest.mark.usefixtures("no_slurm")
def test_a_dry_run_without_slurm_shows_the_script_and_says_that_nobody_was_asked(
    spd_run: Call, tmp_path: Path
) -> None:
    ended = spd_run(
        "-m", "debug=smoke", "seed=3,4", "launcher=slurm", "launcher.dry_run=true", "launcher.partition=gpu",
        "launcher.time=12:00:00", "launcher.memory=32G", "launcher.gpus=2",
    )  # fmt: skip
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert lines[0] == "#!/bin/bash"
    wanted = {"partition=gpu", "time=720", "mem=32G", "gpus-per-node=2", "ntasks-per-node=2", "array=0-1%2"}
    assert {f"#SBATCH --{item}" for item in wanted} <= set(lines)
    assert sum(line.startswith("srun ") for line in lines) == 1
    assert lines[-5:] == [
        "# jobs",
        "#   0: debug=smoke seed=3",
        "#   1: debug=smoke seed=4",
        "# not checked: there is no sbatch here",
        "# nothing was submitted",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_slurm")
@pytest.mark.parametrize("words", [[], ["-m", "seed=0,1"]])
def test_without_slurm_nothing_is_submitted_and_nothing_runs_here(
    spd_run: Call, tmp_path: Path, words: list[str]
) -> None:
    ended = spd_run("launcher=slurm", *words)
    assert ended.code == 2
    assert "launcher=slurm: found no sbatch or srun or squeue here; call spd-run where jobs are" in ended.err
    assert "launcher=local_parallel" in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["launcher=slurm", f"launcher.setup=['export WANDB_API_KEY={CANARY}']"], "launcher.setup"),
        (["launcher=slurm", f"launcher.setup=['export A=1 HF_TOKEN={CANARY}']"], "launcher.setup"),
        (
            ["launcher=slurm", f"++launcher.additional={{export:'ALL,MY_TOKEN={CANARY}'}}"],
            "launcher.additional.export",
        ),
        (["launcher=slurm", f"++launcher.additional={{api_key:{CANARY}}}"], "launcher.additional.api_key"),
        (["launcher=slurm", f"launcher.account=hf_{CANARY}"], "launcher.account"),
        (["launcher=slurm", f"cache_dir=/tmp/hf_{CANARY}"], "cache_dir"),
        (["launcher=local_parallel", f"cache_dir=/tmp/hf_{CANARY}"], "cache_dir"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("dry", [False, True])
def test_a_secret_is_refused_with_its_key_before_anything_is_written(
    spd_run: Call, tmp_path: Path, with_slurm: Path, words: list[str], key: str, dry: bool
) -> None:
    if dry and "launcher=slurm" in words:
        words = [*words, "launcher.dry_run=true"]
    ended = spd_run("-m", "debug=smoke", "seed=0,1", *words)
    assert ended.code == 2
    assert f"{key}: looks like a secret, and would be written into the files of a job; {ADVICE}" in ended.err
    assert CANARY not in ended.out + ended.err
    assert not with_slurm.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["bin"]


@pytest.mark.parametrize("launcher", ["slurm", "local_parallel"])
def test_measuring_a_run_again_is_not_for_a_launcher(spd_run: Call, tmp_path: Path, launcher: str) -> None:
    ended = spd_run("task=analyse", "run=there", f"launcher={launcher}")
    assert ended.code == 2
    assert (
        f"launcher: got {launcher}, but task=analyse is done in this process; use launcher=local" in ended.err
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_slurm")
def test_a_single_job_is_built_before_it_is_submitted(spd_run: Call, tmp_path: Path) -> None:
    ended = spd_run("launcher=slurm", "decomposition.sites.embed.pattern=nowhere", "launcher.dry_run=true")
    assert ended.code == 2
    assert "decomposition.sites.embed.pattern: 'nowhere'" in ended.err
    ended = spd_run("launcher=slurm", "objective=loss/totl", "launcher.dry_run=true")
    assert ended.code == 2
    assert "objective: got loss/totl, which no evaluation of this run measures" in ended.err


@pytest.mark.usefixtures("no_slurm")
@pytest.mark.parametrize("words", [[], ["-m", "seed=0,1"]])
def test_a_job_for_a_gpu_can_be_submitted_where_there_is_none(
    spd_run: Call, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert spd_run("launcher=slurm", "device=cuda", "launcher.dry_run=true", *words).code == 0
    ended = spd_run("launcher=local_parallel", "launcher.gpus=1", "device=cuda", *words)
    assert ended.code == 2
    assert "device: got cuda, but torch sees no GPU; use device=cpu or device=auto" in ended.err


@pytest.mark.parametrize("launcher", ["slurm", "local_parallel"])
def test_a_job_that_wants_a_gpu_must_ask_for_one(spd_run: Call, tmp_path: Path, launcher: str) -> None:
    ended = spd_run(f"launcher={launcher}", "device=cuda", "launcher.gpus=0")
    assert ended.code == 2
    assert f"launcher.gpus: got 0 for device=cuda; launcher={launcher} gives a job the GPUs that" in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_slurm")
def test_where_a_secret_is_to_be_found_is_no_secret(spd_run: Call) -> None:
    setup = ["'export HF_TOKEN=$(cat ~/.token)'", "'export WANDB_API_KEY=$MY_KEY'", "module load cuda"]
    words = f"launcher.setup=[{','.join(setup)}]"
    ended = spd_run("launcher=slurm", "launcher.dry_run=true", words)
    assert ended.code == 0, ended.err
    assert "export HF_TOKEN=$(cat ~/.token)\nexport WANDB_API_KEY=$MY_KEY\nmodule load cuda\n" in ended.out


@pytest.mark.usefixtures("no_slurm")
def test_a_secret_that_no_section_takes_is_not_shown(spd_run: Call) -> None:
    ended = spd_run(
        "launcher=slurm", "launcher.dry_run=true", "allow_extra=true", f"+api_key={CANARY}", "seed=3"
    )
    assert ended.code == 0
    assert CANARY not in ended.out + ended.err
    assert "seed=3" in ended.out


@pytest.mark.usefixtures("no_slurm")
@pytest.mark.parametrize(
    ("words", "lines"),
    [
        (["launcher.partition=a,b"], ["launcher.partition: got a, b in one"]),
        (["launcher.time=1:00:00,2:00:00"], ["launcher.time: got 1:00:00, 2:00:00 in one"]),
        (["launcher.memory=1G,2G"], ["launcher.memory: got 1G, 2G in one"]),
        (["launcher.gpus=0,1,2"], ["launcher.gpus: got 0, 1, 2 in one"]),
        (["launcher.nodes=1,2"], ["launcher.nodes: got 1, 2 in one"]),
        (["launcher.cpus=1,2"], ["launcher.cpus: got 1, 2 in one"]),
        (["launcher.gpus=0", "launcher.ranks_per_node=2,3"], ["launcher.ranks_per_node: got 2, 3 in one"]),
        (["launcher.account=a,b"], ["launcher.account: got a, b in one"]),
        (["launcher.qos=a,b"], ["launcher.qos: got a, b in one"]),
        (["launcher.constraint=a,b"], ["launcher.constraint: got a, b in one"]),
        (["launcher.exclude=a,b"], ["launcher.exclude: got a, b in one"]),
        (["launcher.setup=[a],[b]"], ["launcher.setup: got ['a'], ['b'] in one"]),
        (["launcher.array_parallelism=1,2"], ["launcher.array_parallelism: got 1, 2 in one"]),
        (["launcher.max_requeues=1,2"], ["launcher.max_requeues: got 1, 2 in one"]),
        (["launcher.signal_seconds=60,90"], ["launcher.signal_seconds: got 60, 90 in one"]),
        (["+launcher.additional.nice=1,2"], ["launcher.additional: got {'nice': 1}, {'nice': 2} in one"]),
        (["launcher.wait=true,false"], ["launcher.wait: got True, False in one"]),
        (["launcher.poll_seconds=1,2"], ["launcher.poll_seconds: got 1.0, 2.0 in one"]),
        (["launcher.dry_run=true,false"], ["launcher.dry_run: got True, False in one"]),
        (
            ["launcher.partition=a,b", "launcher.nodes=1,2"],
            ["launcher.partition: got a, b in one", "launcher.nodes: got 1, 2 in one"],
        ),
    ],
)  # fmt: skip
def test_a_sweep_over_a_key_of_the_launcher_is_refused(
    spd_run: Call, tmp_path: Path, words: list[str], lines: list[str]
) -> None:
    ended = spd_run("-m", "launcher=slurm", *words)
    assert ended.code == 2
    for line in lines:
        wanted = f"{line} sweep, must be the same for all its jobs; start a sweep for each"
        assert f"  {wanted}\n" in ended.err
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_over_launchers_is_refused(spd_run: Call, tmp_path: Path) -> None:
    ended = spd_run("-m", "launcher=local,local_parallel,slurm")
    assert ended.code == 2
    kinds = "launcher/local, launcher/local_parallel, launcher/slurm"
    assert f"  launcher: got {kinds} in one sweep, must be the same for all its jobs; " in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no directory of a sweep: it holds no sweep.json"),
        ("{", "sweep.json is damaged: "),
        ("[]", "sweep.json is damaged: "),
    ],
)
def test_the_state_of_what_is_no_sweep_is_refused(
    spd_run: Call, tmp_path: Path, content: str | None, message: str
) -> None:
    (tmp_path / "there").mkdir()
    if content is not None:
        (tmp_path / "there" / "sweep.json").write_text(content)
    ended = spd_run("task=sweep_status", "sweep=there")
    assert ended.code == 2
    assert ended.err.splitlines()[1].startswith(f"  sweep: {tmp_path}/there")
    assert message in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [],
            "sweep: task=sweep_status needs the directory of a sweep, e.g. sweep=outputs/sweeps/<time>_<id>",
        ),
        (["sweep=nowhere"], "nowhere is no directory of a sweep: it holds no sweep.json"),
    ],
)
def test_the_state_of_no_sweep_is_refused(spd_run: Call, words: list[str], message: str) -> None:
    ended = spd_run("task=sweep_status", *words)
    assert (ended.code, message in ended.err) == (2, True)


def test_what_was_there_before_a_refused_submission_is_there_after_it(
    spd_run: Call, tmp_path: Path, with_slurm: Path
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.txt").write_text("precious")
    (tmp_path / "mine" / "environment.json").write_text("{}")
    ended = spd_run("-m", "seed=0,1", "launcher=slurm", f"hydra.sweep.dir={tmp_path}/mine")
    assert ended.code == 2
    assert "launcher: the cluster refuses the job: " in ended.err
    assert with_slurm.exists()
    assert (tmp_path / "mine" / "results.txt").read_text() == "precious"
    assert (tmp_path / "mine" / "environment.json").read_text() == "{}"
    assert not (tmp_path / "mine" / ".submitit").exists()
    assert not (tmp_path / "mine" / "sweep.json").exists()


def test_nothing_is_left_of_a_refused_submission(spd_run: Call, tmp_path: Path, with_slurm: Path) -> None:
    assert spd_run("launcher=slurm").code == 2
    assert with_slurm.exists()
    assert list((tmp_path / "outputs" / "sweeps").iterdir()) == []


def test_a_percent_sign_in_the_place_of_jobs_is_refused_before_anything_is_submitted(
    spd_run: Call, with_slurm: Path
) -> None:
    ended = spd_run("debug=smoke", "launcher=slurm", "out_dir=p%j", "hydra.sweep.dir=p%j/a")
    assert ended.code == 2
    assert "must be without %, which SLURM replaces in the names of log files" in ended.err
    assert not with_slurm.exists()


@pytest.mark.usefixtures("no_slurm")
def test_gpus_of_a_type_are_asked_for_by_their_type(spd_run: Call) -> None:
    words = ["debug=smoke", "launcher=slurm", "launcher.dry_run=true", "launcher.gpus=2"]
    lines = spd_run(*words, "launcher.gpu_type=a100").out.splitlines()
    assert "#SBATCH --gpus-per-node=a100:2" in lines
    assert "#SBATCH --ntasks-per-node=2" in lines
    twice = spd_run(*words, "++launcher.additional={gres: 'gpu:2'}")
    assert (twice.code, "launcher.additional.gres: stands beside launcher.gpus" in twice.err) == (2, True)
    none = spd_run("debug=smoke", "launcher=slurm", "launcher.gpus=0", "launcher.gpu_type=a100")
    assert (none.code, "launcher.gpu_type: got a100 with launcher.gpus=0" in none.err) == (2, True)
