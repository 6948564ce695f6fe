"""Exit codes, messages, and what is passed on to the run."""

import csv
import dataclasses
import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra

from spd_hydra import cli_task
from spd_hydra.api import decompose, load_run
from spd_hydra.config import RunConfig
from spd_hydra.exit_code import ExitCode
from spd_hydra.result import Outcome
from spd_hydra.run import RunError
from spd_hydra.run_dir import RunDirectoryError
from spd_hydra.section import ConfigError
from spd_hydra.stop import Stopped

Call = Callable[..., Any]
END = "Nothing was started. spd-run --help lists every key.\n"
TORCHRUN = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


class FakeRun:
    """Stands in for the run: remembers how it was called, fails where told to."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.errors: dict[int, BaseException] = {}

    def __call__(self, config: RunConfig, **others: Any) -> Outcome:
        self.calls.append({"config": config, "argv": list(sys.argv), **others})
        if config.seed in self.errors:
            raise self.errors[config.seed]
        return Outcome(None, {"losses": {"total": 0.5}})


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    fake = FakeRun()
    monkeypatch.setattr(cli_task, "run", fake)
    return fake


def test_a_single_run_gets_its_configuration_and_the_command_as_typed(
    spd_run: Call, fake_run: FakeRun, tmp_path: Path
) -> None:
    ended = spd_run("experiment=resid_mlp1", "seed=3", "hydra.verbose=false")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    (call,) = fake_run.calls
    assert (call["config"].name, call["config"].seed) == ("resid_mlp1", 3)
    assert (call["run_dir"], call["saved"]) == (None, None)
    assert call["argv"] == ["spd-run", "experiment=resid_mlp1", "seed=3", "hydra.verbose=false"]
    assert list(tmp_path.iterdir()) == []  # Hydra made no folders
    assert not GlobalHydra.instance().is_initialized()


def test_a_wrong_configuration_ends_with_2_before_anything_starts(spd_run: Call, fake_run: FakeRun) -> None:
    ended = spd_run("trian.steps=5", "train.lr=nan")
    assert ended.code == 2
    assert ended.err == (
        "The configuration is not valid:\n"
        "  trian.steps: there is no such key; did you mean train.steps? (given as trian.steps=5)\n"
        "  train.lr: got nan, must be finite and > 0\n" + END
    )
    assert fake_run.calls == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["resume=/no/such"], "resume: /no/such is no run directory: there is no such directory"),
        (["--config-dir", "/no/such"], "--config-dir: there is no folder /no/such"),
        (
            ["--config-name", "x"],
            "--config-name, --config-path: not supported; add YAML files with --config-dir",
        ),
        (
            ["--experimental-rerun", "x.pickle"],
            "--experimental-rerun: would unpickle a file, which can run any code; use resume=",
        ),
        (["--cfg", "job", "sede=1"], "sede: there is no such key; did you mean seed? (given as sede=1)"),
        (["-m", "seed=0,1", "model=null"], "model: got null; choose one of "),
        (["-m", "seed="], "seed: got nothing, must be a whole number ≥ 0"),
        (["out_dir=~/x"], "out_dir=~/x: not understood; write ~ as $HOME, or in quotes: 'out_dir=\"~/x\"'"),
        (
            ["task=analyse", "run=there", "device=cpu", "threads=2", "hydra.verbose=true", "loss=vpd"],
            "task=analyse measures a run as it was trained, so it takes task, run, eval, device, threads, "
            "launcher, trust_remote_code only; leave out loss=vpd",
        ),
        (
            ["--experiment", "tms_5-2"],
            "--experiment: there is no such option; keys are written without dashes, as experiment=…",
        ),
        (
            ["-m", "train.lr=interval(0.1,1)"],
            "train.lr: got interval(0.1,1), which needs a sweeper that chooses as it goes, hydra/sweeper=…; "
            "for a grid list the values, as train.lr=1,2,4",
        ),
        (["seed=range(5)"], "seed: got several values (range(5)); to run once with each add -m"),
        (["threads=1025"], "threads: got 1025, must be ≥ 0 and ≤ 1024"),
        (["-m", "seed"], "seed: not understood; write key=value, e.g. seed=1"),
    ],
)
def test_words_that_make_no_sense_end_with_2(
    spd_run: Call, fake_run: FakeRun, words: list[str], line: str
) -> None:
    ended = spd_run(*words)
    assert ended.code == 2
    assert ended.err.splitlines()[1].startswith(f"  {line}")
    assert ended.err.endswith(END)
    assert fake_run.calls == []


@pytest.mark.parametrize("key", ["resume", "run"])
def test_a_directory_that_is_no_run_ends_with_2_and_one_message(
    spd_run: Call, tmp_path: Path, key: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    task = ["task=analyse"] if key == "run" else []
    reasons = {
        "empty": "empty is no run directory: it holds no config.yaml",
        "nowhere": "nowhere is no run directory: there is no such directory",
        "file": "file is a file and no run directory",
    }
    for name, reason in reasons.items():
        ended = spd_run(*task, f"{key}={name}")
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.splitlines()[:2] == ["The configuration is not valid:", f"  {key}: {reason}"]
        assert "Traceback" not in ended.err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            ConfigError("out_dir: cannot be used"),
            2,
            "The configuration is not valid:\n  out_dir: cannot be used\n",
        ),
        (RunError("loss is NaN at step 3"), 1, "The run failed: loss is NaN at step 3\n"),
        (RunDirectoryError("no room"), 1, "The run failed: no room\n"),
        (SystemExit(7), 1, "The run ended itself with exit code 7.\n"),
        (KeyboardInterrupt(), 130, "Interrupted.\n"),
    ],
)
def test_a_run_that_fails_foreseeably_says_why_in_a_line(
    spd_run: Call, fake_run: FakeRun, error: BaseException, code: int, text: str
) -> None:
    fake_run.errors[0] = error
    ended = spd_run()
    assert (ended.code, ended.err) == (code, text)


def test_a_bug_shows_its_traceback_and_ends_with_1(spd_run: Call, fake_run: FakeRun) -> None:
    fake_run.errors[0] = ZeroDivisionError("somewhere")
    ended = spd_run()
    assert ended.code == 1
    assert ended.err.startswith("The run failed with an error that should not happen:\nTraceback")
    assert ended.err.endswith("ZeroDivisionError: somewhere\n")


def test_a_sweep_runs_every_job_in_a_folder_of_its_own_even_when_one_fails(
    spd_run: Call, fake_run: FakeRun, tmp_path: Path
) -> None:
    fake_run.errors[1] = RunError("loss is NaN at step 3")
    ended = spd_run("-m", "seed=range(3)", "train.steps=5")
    assert ended.code == 3
    assert [call["config"].seed for call in fake_run.calls] == [0, 1, 2]
    (sweep,) = (tmp_path / "outputs" / "sweeps").iterdir()
    assert [call["run_dir"] for call in fake_run.calls] == [sweep / str(job) for job in range(3)]
    assert fake_run.calls[0]["argv"] == ["spd-run", "-m", "seed=range(3)", "train.steps=5"]
    assert "The run failed: loss is NaN at step 3" in ended.err
    assert "Traceback" not in ended.err
    assert str(sweep / "sweep.html") in ended.out
    with (sweep / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["experiment"], row["seed"]) for row in rows] == [("tms_5-2", str(seed)) for seed in range(3)]


def test_a_sweep_without_failures_ends_with_0(spd_run: Call, fake_run: FakeRun) -> None:
    assert spd_run("-m", "seed=0,1").code == 0
    assert len(fake_run.calls) == 2


def test_a_sweep_that_is_interrupted_still_shows_its_table(spd_run: Call, fake_run: FakeRun) -> None:
    fake_run.errors[1] = KeyboardInterrupt()
    ended = spd_run("-m", "seed=range(3)")
    assert ended.code == 130
    assert [call["config"].seed for call in fake_run.calls] == [0, 1]
    assert "sweep.html" in ended.out


def test_a_sweep_goes_where_it_is_told(spd_run: Call, fake_run: FakeRun, tmp_path: Path) -> None:
    assert spd_run("-m", "seed=0,1", f"hydra.sweep.dir='{tmp_path}/my sweep'").code == 0
    assert [call["run_dir"] for call in fake_run.calls] == [tmp_path / "my sweep" / job for job in ("0", "1")]


def rows_of(sweep: Path) -> list[dict[str, str]]:
    with (sweep / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_names_what_each_job_ran_also_where_the_sweeper_chose_the_order(
    spd_run: Call, fake_run: FakeRun, tmp_path: Path
) -> None:
    orders = set()
    for attempt in range(3):  # each shuffled twice, by the plan and by Hydra: one in twenty-four is the same
        fake_run.calls.clear()
        where = tmp_path / str(attempt)
        assert spd_run("-m", "train.lr=shuffle(1e-3,2e-3,3e-3,4e-3)", f"hydra.sweep.dir={where}").code == 0
        ran = [call["config"].train.lr for call in fake_run.calls]
        assert [float(row["train.lr"]) for row in rows_of(where)] == ran
        assert sorted(ran) == [1e-3, 2e-3, 3e-3, 4e-3]
        orders.add(tuple(ran))
    assert len(orders) > 1


def test_every_job_runs_the_configuration_that_was_checked(
    spd_run: Call, fake_run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    preset = tmp_path / "my_conf" / "loss" / "gentle.yaml"
    preset.parent.mkdir(parents=True)
    text = "defaults: [delta, _self_]\nimportance_minimality: {coeff: %s}\n"
    preset.write_text(text % 1e-3)

    def edited(config: RunConfig, **others: Any) -> Outcome:
        preset.write_text(text % 7e-3)
        return fake_run(config, **others)

    monkeypatch.setattr(cli_task, "run", edited)
    assert spd_run("-m", "--config-dir", str(tmp_path / "my_conf"), "loss=gentle", "seed=0,1").code == 0
    assert [call["config"].loss.importance_minimality.coeff for call in fake_run.calls] == [1e-3, 1e-3]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "used",
            "hydra.sweep.dir: got used, which holds a sweep already; choose another, or go on with it: "
            "resume=used",
        ),
        (
            "'new/${now:%Y}'",
            "hydra.sweep.dir: got new/${now:%Y}, which has a value only when the sweep has begun; write the "
            "directory out, or leave it out for a new one below out_dir",
        ),
        ("/proc/nope", "/proc/nope: the sweep cannot be written there: No such file or directory"),
    ],
)
def test_a_directory_that_no_sweep_can_have_is_refused(
    spd_run: Call, fake_run: FakeRun, tmp_path: Path, given: str, message: str
) -> None:
    assert spd_run("-m", "seed=0,1", "hydra.sweep.dir=used").code == 0
    kept = (tmp_path / "used" / "sweep.csv").read_bytes()
    ended = spd_run("-m", "seed=2,3", f"hydra.sweep.dir={given}")
    assert (ended.code, ended.err) == (2, f"The configuration is not valid:\n  {message}\n{END}")
    assert len(fake_run.calls) == 2
    assert (tmp_path / "used" / "sweep.csv").read_bytes() == kept
    assert not (tmp_path / "new").exists()


def test_a_signal_during_the_end_of_a_run_lets_no_further_job_begin(
    spd_run: Call, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped_late(config: RunConfig, **others: Any) -> Outcome:
        return dataclasses.replace(fake_run(config, **others), late_stop=Stopped(signal.SIGTERM))

    monkeypatch.setattr(cli_task, "run", stopped_late)
    ended = spd_run("-m", "seed=0,1")
    assert ended.code == 143
    assert [call["config"].seed for call in fake_run.calls] == [0]
    assert "sweep.html" in ended.out


def test_the_table_of_a_sweep_is_shown_also_where_it_cannot_be_written(
    spd_run: Call, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_allowed(directory: Path, rows: Any) -> Any:
        raise PermissionError(13, "Permission denied", str(directory / "sweep.csv"))

    assert spd_run("-m", "seed=0,1", "hydra.sweep.dir=theirs").code == 0
    monkeypatch.setattr("spd_hydra.report.write_sweep", not_allowed)
    ended = spd_run("task=sweep_status", "sweep=theirs")
    assert (ended.code, ended.err) == (0, "")
    place = Path("theirs", "sweep.csv").absolute()
    assert f"  sweep.csv and sweep.html could not be written: Permission denied: {place}\n" in ended.out
    assert "tms_5-2" in ended.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["-m", "seed=0,1"],
            "-m: got a sweep in each of 2 processes, which train one decomposition together; start it with "
            "spd-run alone: launcher.ranks_per_node=2 gives every job as many processes",
        ),
        (
            ["launcher.ranks_per_node=3"],
            "launcher: got local, which would start processes, in each of 2 that train one decomposition "
            "together; leave it out, or start spd-run alone",
        ),
        (
            ["launcher=local_parallel"],
            "launcher: got local_parallel, which would start processes, in each of 2 that train one "
            "decomposition together; leave it out, or start spd-run alone",
        ),
    ],
)
def test_processes_that_train_together_start_no_jobs(
    spd_run: Call, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    ended = spd_run(*words)
    assert (ended.code, ended.err) == (2, f"The configuration is not valid:\n  {message}\n{END}")
    assert fake_run.calls == []
    assert not Path("outputs").exists()


@pytest.mark.parametrize(
    ("given", "wrong"),
    [
        ({"WORLD_SIZE": "2"}, "got 2 in the environment, without RANK, MASTER_ADDR, MASTER_PORT; "),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "got 2 in the environment, without MASTER_ADDR, MASTER_PORT; "),
        (TORCHRUN | {"WORLD_SIZE": "two"}, "got two in the environment, which is no number of processes; "),
    ],
)
def test_half_of_what_torchrun_says_is_a_leftover_and_told(
    spd_run: Call, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], wrong: str
) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    ended = spd_run()
    assert (ended.code, fake_run.calls) == (2, [])
    assert ended.err.startswith(f"The configuration is not valid:\n  WORLD_SIZE: {wrong}to run alone, unset")


def test_tasks_of_srun_that_nobody_told_of_each_other_are_refused_unless_each_is_to_be_alone(
    spd_run: Call, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    ended = spd_run()
    assert (ended.code, fake_run.calls) == (2, [])
    assert "srun: started 2 times, and each would train the whole run for itself; start one" in ended.err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert spd_run().code == 0
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert spd_run().code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["-m", "seed=0,1", "hydra.sweep.subdir=x"],
            "hydra.sweep.subdir: got x, but the jobs of a sweep lie in folders with their numbers, where its "
            "table and resume= look for them; leave it out",
        ),
        (
            ["-m", "seed=0,1", "run_dir=here"],
            "run_dir: got here in a sweep, whose jobs have folders of their own; choose where with "
            "hydra.sweep.dir=",
        ),
        (
            ["-m", "seed=0,1", "out_dir=a,b"],
            "out_dir: got a, b in one sweep, whose jobs lie in one folder; start a sweep for each, or put a "
            "path with a comma in quotes: 'out_dir=\"a,b\"'",
        ),
        (
            ["run_dir=here", "launcher=local_parallel"],
            "run_dir: got here with launcher=local_parallel, whose jobs have folders of their own in which "
            "they go on; choose where with hydra.sweep.dir=",
        ),
        (
            ["run_dir=here", "task=check"],
            "run_dir: got here with task=check, which begins no run: leave it out",
        ),
    ],
)
def test_where_jobs_and_runs_lie_is_not_chosen_where_it_would_go_unheard(
    spd_run: Call, fake_run: FakeRun, words: list[str], message: str
) -> None:
    ended = spd_run("debug=smoke", *words)
    assert (ended.code, ended.err) == (2, f"The configuration is not valid:\n  {message}\n{END}")
    assert fake_run.calls == []
    assert not Path("outputs").exists()


def test_a_run_with_a_directory_of_its_own_begins_there_and_called_again_goes_on(spd_run: Call) -> None:
    words = ["debug=smoke", "threads=1", "run_dir=runs/mine", "train.checkpoint_every=10"]
    assert spd_run(*words).code == 0
    assert load_run("runs/mine").summary["steps"] == 20
    assert not Path("outputs").exists()
    again = spd_run(*words)
    assert (again.code, again.err) == (0, "")
    assert "has finished its 20 steps: nothing to do" in again.out
    further = spd_run(*words, "train.steps=30")
    assert "going on from step 20" in further.out
    assert load_run("runs/mine").summary["steps"] == 30
    other = spd_run(*words, "train.steps=30", "train.lr=0.5")
    assert other.code == 2
    assert "these changes would make it another run:" in other.err
    assert "train.lr: 0.002 → 0.5" in other.err


def test_from_python_too_a_run_has_its_directory_and_goes_on_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["debug=smoke", "threads=1", "eval.figures=false", "cache_dir=cache", "run_dir=mine"]
    first = decompose(words)
    assert first.path == tmp_path / "mine"
    assert decompose([*words, "train.steps=22"]).summary["steps"] == 22


def test_a_folder_with_too_long_a_name_is_told_in_a_line(spd_run: Call) -> None:
    ended = spd_run("debug=smoke", "threads=1", f"out_dir={'x' * 300}")
    assert ended.code == 1
    assert ended.err.startswith("The run failed: cannot make the run directory ")
    assert "File name too long" in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_between_the_runs_of_a_sweep_ends_it_with_its_table(
    spd_run: Call, fake_run: FakeRun, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def then_a_signal(config: RunConfig, **others: Any) -> Outcome:
        outcome = fake_run(config, **others)
        os.kill(os.getpid(), number)
        return outcome

    monkeypatch.setattr(cli_task, "run", then_a_signal)
    outside = signal.signal(number, signal.SIG_DFL)  # below nohup SIGHUP is ignored, and then not heard
    try:
        ended = spd_run("-m", "seed=0,1")
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, outside)
    assert (ended.code, ended.err.splitlines()[-1]) == (143, "Stopped.")
    assert [call["config"].seed for call in fake_run.calls] == [0]
    assert "sweep.html" in ended.out


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_told_in_a_line_and_its_job_has_failed(
    spd_run: Call, fake_run: FakeRun, number: int
) -> None:
    fake_run.errors[1] = OSError(number, os.strerror(number), "/there/file")
    ended = spd_run("-m", "seed=0,1")
    text = f"cannot write /there/file: {os.strerror(number)}. Check that it exists, is writable and has room"
    assert (ended.code, "Traceback" in ended.err) == (3, False)
    assert f"The run failed: {text}" in ended.err
    assert f"  job 1: {text}" in ended.out
    table = ended.out[ended.out.index("  job  setting") :].splitlines()
    assert [line.split()[2] for line in table[2:4]] == ["missing", "failed"]  # the fake run leaves nothing


def test_a_sweep_of_checks_leaves_nothing_behind(
    spd_run: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    ended = spd_run("-m", "task=check", "debug=smoke", "seed=0,1")
    assert ended.code == 0
    assert "missing" not in ended.out
    assert [path.name for path in tmp_path.rglob("*") if "torchinductor" not in str(path)] == ["temporary"]


def test_all_mistakes_of_all_jobs_are_told_before_the_first_one_starts(
    spd_run: Call, fake_run: FakeRun, tmp_path: Path
) -> None:
    ended = spd_run("-m", "debug=smoke", "seed=0,-1", "train.steps=5,0")
    assert ended.code == 2
    assert ended.err == (
        "The configuration is not valid:\n"
        "  jobs 1 (seed=0 train.steps=0), 3 (seed=-1 train.steps=0): train.steps: got 0, must be ≥ 1\n"
        "  jobs 2 (seed=-1 train.steps=5), 3 (seed=-1 train.steps=0): seed: got -1, must be ≥ 0\n" + END
    )
    assert fake_run.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_that_shows_only_when_building_stops_a_sweep_as_well(
    spd_run: Call, fake_run: FakeRun
) -> None:
    ended = spd_run("-m", "decomposition.sites.embed.pattern=embed,nope")
    assert ended.code == 2
    assert (
        "  job 1 (decomposition.sites.embed.pattern=nope): decomposition.sites.embed.pattern: 'nope'"
        in ended.err
    )
    assert fake_run.calls == []


def test_a_resumed_run_gets_the_saved_configuration_with_the_changes_on_top(
    spd_run: Call, fake_run: FakeRun, tmp_path: Path
) -> None:
    saved = spd_run("--cfg", "job", "experiment=resid_mlp1", "seed=9")
    assert saved.code == 0
    from spd_hydra.composition import compose
    from spd_hydra.saved_config import to_yaml

    folder = tmp_path / "a run, with 'odd' letters"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(compose(["experiment=resid_mlp1", "seed=9"])))
    quoted = str(folder).replace("'", "\\'")
    ended = spd_run(f"resume='{quoted}'", "train.steps=30000", "decomposition.sites.mlp_in.C=7")
    assert (ended.code, ended.err) == (0, "")
    (call,) = fake_run.calls
    assert call["saved"].decomposition.sites["mlp_in"].C == 100
    assert call["config"].decomposition.sites["mlp_in"].C == 7
    assert (call["config"].seed, call["config"].train.steps) == (9, 30_000)
    assert call["config"].resume == str(folder)


def test_variables_of_a_dotenv_file_reach_the_configuration(
    spd_run: Call, fake_run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPD_OUT_DIR", "unset below, so that it is restored after the test")
    monkeypatch.delenv("SPD_OUT_DIR")
    (tmp_path / ".env").write_text("SPD_OUT_DIR=from_dotenv\n")
    spd_run()
    assert fake_run.calls[0]["config"].out_dir == "from_dotenv"


def test_the_configuration_can_be_looked_at_without_running(spd_run: Call, fake_run: FakeRun) -> None:
    shown = spd_run("--cfg", "job", "--package", "train", "experiment=resid_mlp1")
    assert shown.code == 0
    assert "steps: 15000\n" in shown.out
    tree = spd_run("--info", "defaults-tree", "experiment=resid_mlp1")
    assert tree.code == 0
    assert (tree.out + tree.err).count("loss: resid_mlp1") == 1
    assert fake_run.calls == []


@pytest.mark.parametrize("look", [["--cfg", "job"], ["--info", "defaults-tree"]])
def test_a_configuration_that_is_not_composed_is_not_shown(spd_run: Call, look: list[str]) -> None:
    ended = spd_run(*look, "resume=outputs/tms_5-2/1")
    message = (
        "--cfg, --info: got resume=outputs/tms_5-2/1, a run whose configuration is in its config.yaml; look "
        "there, or leave it out"
    )
    assert (ended.code, ended.err) == (2, f"The configuration is not valid:\n  {message}\n{END}")


def test_the_versions_are_shown(spd_run: Call) -> None:
    ended = spd_run("--version")
    assert ended.code == 0
    assert [word for word in ended.out.split() if not word[0].isdigit()] == [
        "spd_hydra",
        "hydra-core",
        "torch",
    ]


@pytest.mark.slow
def test_a_sweep_over_replicas_has_a_row_for_each_of_them(spd_run: Call) -> None:
    ended = spd_run("-m", "debug=smoke", "train.replicas=2", "seed=0,5", "train.steps=10")
    assert ended.code == ExitCode.ok
    for run, seed in {"0/0": 0, "0/1": 1, "1/0": 5, "1/1": 6}.items():
        assert any(line.split()[:1] == [run] and "done" in line for line in ended.out.splitlines())
        assert load_run(f"outputs/sweeps/{_only(Path('outputs/sweeps'))}/{run}").config.seed == seed


def _only(folder: Path) -> str:
    (found,) = folder.iterdir()
    return found.name
