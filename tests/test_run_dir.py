"""A run directory has one writer, whole files, and says clearly when it cannot be used."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import yaml

from spd_hydra import atomic, load_run
from spd_hydra.command_word import command_word
from spd_hydra.run_dir import RunDirectory, RunDirectoryError, Status
from spd_hydra.section import ConfigError

HOSTILE_NAMES = [
    "", ".", "..", "../x", "a/../b", "a/..", "/absolute", "a//b", "a/", "/", "./a", "a/./b", ".hidden", "-rf",
    "~", "~root/x", "a\\b", "..\\x", "a\0b", "a\nb", " a", "a b", "$HOME", "`id`", "C:x", "a:b", "a*",
    "ａ／ｂ", "\u202eabc", "x" * 300, "a/b/c/d/e", "%2e%2e/x",
]  # fmt: skip

HOLD = """
import sys, time
from pathlib import Path
from spd_hydra.run_dir import RunDirectory
directory = RunDirectory.open(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunDirectory]:
    with RunDirectory.create(tmp_path, "tms_5-2") as directory:
        directory.write_config("seed: 1\n")
        yield directory


# ---- making one ----------------------------------------------------------------------------------------


def test_a_run_gets_a_directory_of_its_own_named_after_experiment_and_time(tmp_path: Path) -> None:
    with RunDirectory.create(tmp_path, "tms_5-2") as one, RunDirectory.create(tmp_path, "tms_5-2") as two:
        assert one.path != two.path
        for directory in (one, two):
            assert directory.path.parent == tmp_path / "tms_5-2"
            assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]{6}", directory.path.name)


@pytest.mark.parametrize("name", ["tms_5-2", "paper/tms_5-2", "a", "A.b+c", "sub/dir/x"])
def test_plain_and_nested_names_are_allowed(tmp_path: Path, name: str) -> None:
    with RunDirectory.create(tmp_path / "root", name) as directory:
        assert directory.path.parent == tmp_path / "root" / name


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_names_that_are_no_plain_names_are_refused_and_nothing_is_made(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"name: got .* must be letters"):
        RunDirectory.create(tmp_path / "root", name)
    assert list(tmp_path.iterdir()) == []


def test_a_link_among_the_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "exp").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="is a link"):
        RunDirectory.create(tmp_path / "root", "exp")
    assert list((tmp_path / "outside").iterdir()) == []


def test_two_runs_never_share_a_directory_even_with_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)

    stopped = Mock(now=lambda: datetime(2030, 1, 2, 3, 4, 5))
    monkeypatch.setattr("spd_hydra.run_dir.datetime", stopped)
    with RunDirectory.create(tmp_path, "a"), pytest.raises(RunDirectoryError, match="File exists"):
        RunDirectory.create(tmp_path, "a")


def test_a_directory_of_a_sweep_is_taken_with_the_logs_that_lie_there(tmp_path: Path) -> None:
    (tmp_path / ".hydra").mkdir()
    for name in ("spd-run.log", "12_0.out", "12_0.err"):
        (tmp_path / name).write_text("")
    with RunDirectory.at(tmp_path) as directory:
        directory.write_config("a: 1\n")
    with RunDirectory.at(tmp_path / "not" / "yet"):
        assert (tmp_path / "not" / "yet").is_dir()


@pytest.mark.parametrize("name", ["config.yaml", "thesis.tex", "checkpoints", "metrics.jsonl"])
def test_a_directory_that_holds_something_is_not_taken(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(RunDirectoryError, match=rf"already holds {name}.*resume="):
        RunDirectory.at(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_the_word_to_go_on_in_a_directory_can_be_pasted_whatever_its_name(tmp_path: Path) -> None:
    path = tmp_path / "ü (1), it's = #2"
    path.mkdir()
    (path / "config.yaml").touch()
    with pytest.raises(RunDirectoryError) as caught:
        RunDirectory.at(path)
    assert str(caught.value).endswith(f" use {command_word('resume', path)}")


@pytest.mark.parametrize("how", [RunDirectory.open, RunDirectory.view])
def test_only_the_directory_of_a_run_is_opened(tmp_path: Path, how: object) -> None:
    assert callable(how)
    with pytest.raises(RunDirectoryError, match=r"it has no config\.yaml"):
        how(tmp_path)
    with pytest.raises(RunDirectoryError, match="there is no such directory"):
        how(tmp_path / "missing")


# ---- one writer ----------------------------------------------------------------------------------------


def test_a_second_writer_is_told_at_once_who_holds_the_directory(run: RunDirectory) -> None:
    began = time.monotonic()
    with pytest.raises(RunDirectoryError, match=rf"process {os.getpid()} on .* since \d{{4}}-"):
        RunDirectory.open(run.path)
    assert time.monotonic() - began < 1.0
    assert run.is_being_written()
    run.close()
    assert not run.is_being_written()
    RunDirectory.open(run.path).close()


def test_the_lock_of_another_process_ends_when_it_is_killed(run: RunDirectory) -> None:
    run.close()
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError, match=f"process {process.pid} on"):
            RunDirectory.open(run.path)
        process.send_signal(signal.SIGKILL)
        process.wait()
    with RunDirectory.open(run.path) as again:
        again.write_status(Status.running, 1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_worker_that_outlives_its_run_does_not_keep_the_lock(run: RunDirectory) -> None:
    read_end, write_end = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(write_end)
        os.read(read_end, 1)  # until the parent lets go
        os._exit(0)
    os.close(read_end)
    try:
        assert run.is_being_written(), "the end of the child's hold is not the end of the parent's"
        run.close()
        RunDirectory.open(run.path).close()
    finally:
        os.close(write_end)
        os.waitpid(worker, 0)


def test_a_viewer_reads_while_a_run_writes(run: RunDirectory) -> None:
    run.append_metrics(1, "train", {"loss/total": 0.5})
    viewer = RunDirectory.view(run.path)
    assert viewer.read_metrics() == [{"step": 1, "split": "train", "loss/total": 0.5}]
    assert viewer.read_config() == "seed: 1\n"
    with pytest.raises(AssertionError, match="not written to"):
        viewer.write_status(Status.done, 1)
    with pytest.raises(AssertionError, match="not written to"):
        viewer.append_metrics(1, "train", {})


def test_asking_who_writes_never_disturbs_a_writer(run: RunDirectory) -> None:
    run.close()
    poll = (
        "import sys, time\nfrom pathlib import Path\nfrom spd_hydra.lock import FileLock\nprint(flush=True)\n"
    )
    poll += "end = time.monotonic() + 1.0\nwhile time.monotonic() < end: FileLock.is_held(Path(sys.argv[1]))"
    process = subprocess.Popen([sys.executable, "-c", poll, str(run.path / ".lock")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
        opened = 0
        while process.poll() is None:
            RunDirectory.open(run.path).close()
            opened += 1
    assert opened > 3


# ---- files ---------------------------------------------------------------------------------------------


def test_the_configuration_keeps_its_text_unless_it_holds_a_secret(run: RunDirectory) -> None:
    text = "# a comment\ntrain:\n  lr: 1e-3   # kept\n"
    run.write_config(text)
    assert run.read_config() == text
    run.write_config("logger:\n  api_key: canary-4711\n  project: β\nseed: 3\n")
    assert "canary" not in run.read_config()
    assert yaml.safe_load(run.read_config()) == {
        "logger": {"api_key": "<redacted>", "project": "β"}, "seed": 3
    }  # fmt: skip


def test_the_environment_is_saved_without_secrets(run: RunDirectory) -> None:
    run.write_environment({"python": "3.11", "variables": {"HF_TOKEN": "canary-4711"}})
    assert json.loads((run.path / "environment.json").read_text()) == {
        "python": "3.11", "variables": {"HF_TOKEN": "<redacted>"}
    }  # fmt: skip


def test_the_status_tells_state_step_error_and_times(run: RunDirectory) -> None:
    assert run.read_status() is None
    run.write_status(Status.running, 3)
    first = run.read_status()
    assert first is not None
    assert (first["status"], first["step"], first["error"], first["finished"]) == ("running", 3, None, None)
    run.write_status(Status.failed, 7, error="loss is NaN")
    last = run.read_status()
    assert last is not None
    assert (last["status"], last["step"], last["error"]) == ("failed", 7, "loss is NaN")
    assert last["started"] == first["started"]
    assert last["finished"] == last["updated"]


def test_a_summary_with_nan_is_still_json_for_everyone(run: RunDirectory) -> None:
    run.write_summary({"mmcs": math.nan, "ml2r": np.float64(1.5), "list": [math.inf, 1], "solved": None})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (run.path / "summary.json").read_text()
    expected = {"mmcs": None, "ml2r": 1.5, "list": [None, 1], "solved": None}
    assert json.loads(text, parse_constant=refuse) == expected
    assert run.read_summary() == expected


def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.write_summary({"a": 1})
    before = sorted(path.name for path in run.path.iterdir())

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunDirectoryError, match=r"cannot write .*summary\.json: No space left on device"):
        run.write_summary({"a": 2})
    assert run.read_summary() == {"a": 1}
    assert sorted(path.name for path in run.path.iterdir()) == before


def test_leftovers_of_a_killed_writer_are_removed_when_the_run_goes_on(run: RunDirectory) -> None:
    (run.path / ".status.json.123-abcd.tmp").write_text("{")
    (run.path / ".mine.tmp").mkdir()
    run.close()
    with RunDirectory.open(run.path) as again:
        assert [path.name for path in again.path.glob(".*.tmp")] == [".mine.tmp"]


def test_files_and_directories_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o007)
    try:
        with RunDirectory.create(tmp_path / "root", "a") as directory:
            directory.write_config("a: 1\n")
            directory.append_metrics(1, "train", {})
            assert directory.path.stat().st_mode & 0o777 == 0o770
            assert {path.stat().st_mode & 0o777 for path in directory.path.iterdir()} == {0o660}
    finally:
        os.umask(before)


def test_replacing_a_file_creates_it_whole_or_raises(tmp_path: Path) -> None:
    atomic.replace(tmp_path / "a", "β")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "β"
    with pytest.raises(FileExistsError):
        atomic.write_new(tmp_path / "a", b"")
    assert (tmp_path / "a").read_text(encoding="utf-8") == "β"


# ---- places that cannot be written ---------------------------------------------------------------------


@pytest.mark.parametrize("root", ["/proc/nowhere", "/dev/null/x"])
def test_a_root_that_cannot_be_written_is_named_at_once(root: str) -> None:
    began = time.monotonic()
    with pytest.raises(RunDirectoryError, match=rf"cannot make the run directory {root}/a/.*out_dir="):
        RunDirectory.create(Path(root), "a")
    assert time.monotonic() - began < 1.0


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_read_only_directory_is_named_for_whoever_may_not_write() -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run"
        path.mkdir()
        (path / "config.yaml").write_text("a: 1\n")
        path.chmod(0o555)
        Path(name).chmod(0o755)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:  # as nobody, because root may write anywhere
            try:
                if os.geteuid() == 0:
                    os.setuid(65534)
                RunDirectory.open(path)
            except RunDirectoryError as error:
                os.write(write_end, str(error).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        os.waitpid(pid, 0)
        with os.fdopen(read_end) as pipe:
            message = pipe.read()
    assert message.startswith(f"cannot write to the run directory {path}: Permission denied")


def test_a_directory_that_vanishes_is_one_readable_error(run: RunDirectory) -> None:
    shutil.rmtree(run.path)
    writes: list[Callable[[], None]] = [
        lambda: run.append_metrics(1, "train", {"a": 1.0}),
        lambda: run.write_status(Status.running, 1),
        lambda: run.write_summary({}),
    ]
    for write in writes:
        with pytest.raises(RunDirectoryError, match=f"cannot write {run.path}.*No such file"):
            write()
    assert not run.path.exists()


def test_a_directory_whose_run_has_yet_to_write_its_configuration_is_told_as_beginning(
    tmp_path: Path,
) -> None:
    said = "its run is just beginning and has written no config.yaml yet; look again in a few seconds"
    with RunDirectory.create(tmp_path, "toy") as directory:
        with pytest.raises(ConfigError) as opened:
            load_run(directory.path)
        with pytest.raises(RunDirectoryError) as viewed:
            RunDirectory.view(directory.path)
        assert str(opened.value) == str(viewed.value) == f"{directory.path}: {said}"
    with pytest.raises(ConfigError, match=r"is no run directory: it holds no config\.yaml"):  # it was killed
        load_run(directory.path)


# ---- metrics -------------------------------------------------------------------------------------------


def test_metrics_are_one_object_per_line_and_readable_at_once(run: RunDirectory) -> None:
    run.append_metrics(1, "train", {"loss/total": 0.1, "n": 3})
    run.append_metrics(1, "eval", {"l0/embed": torch.tensor(0.25).item(), "bad": math.nan})
    run.append_metrics(2, "train", {"loss/total": float(np.float32(0.5))})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    expected = [
        {"step": 1, "split": "train", "loss/total": 0.1, "n": 3},
        {"step": 1, "split": "eval", "l0/embed": 0.25, "bad": None},
        {"step": 2, "split": "train", "loss/total": 0.5},
    ]
    assert [json.loads(line) for line in lines] == expected
    assert run.read_metrics() == expected


def test_a_metric_may_not_hide_the_step(run: RunDirectory) -> None:
    with pytest.raises(AssertionError, match="may not be called"):
        run.append_metrics(1, "train", {"step": 2.0})


def test_truncation_drops_later_rows_and_keeps_the_bytes_of_the_others(run: RunDirectory) -> None:
    assert run.truncate_metrics(5) == 0
    for step in (0, 10, 20, 30):
        run.append_metrics(step, "train", {"loss/total": 1 / (step + 3)})
        run.append_metrics(step, "eval", {"l0": 0.1})
    lines = (run.path / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert run.truncate_metrics(20) == 2
    assert (run.path / "metrics.jsonl").read_bytes() == b"".join(lines[:6])
    assert run.truncate_metrics(19) == 2
    run.append_metrics(20, "train", {})
    assert [row["step"] for row in run.read_metrics()] == [0, 0, 10, 10, 20]
    assert run.truncate_metrics(-1) == 5
    assert run.read_metrics() == []


def test_a_row_takes_the_place_of_that_of_its_step_and_split_or_stands_among_those_of_its_step(
    run: RunDirectory,
) -> None:
    for step in (0, 10, 20):
        run.append_metrics(step, "train", {"loss/total": 1 / (step + 3)})
    run.append_metrics(20, "eval", {"l0/embed": 1.0, "old/one": 2.0})
    run.append_metrics(30, "train", {})
    path = run.path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    run.replace_metrics(20, "eval", {"l0/embed": 3.0})
    run.replace_metrics(10, "eval", {"l0/embed": math.inf})
    made = [
        b'{"step": 10, "split": "eval", "l0/embed": null}\n',
        b'{"step": 20, "split": "eval", "l0/embed": 3.0}\n',
    ]
    assert path.read_bytes().splitlines(keepends=True) == [*lines[:2], made[0], lines[2], made[1], lines[4]]
    path.unlink()
    run.replace_metrics(5, "eval", {})
    assert run.read_metrics() == [{"step": 5, "split": "eval"}]


def test_a_line_torn_at_any_byte_costs_only_itself(run: RunDirectory) -> None:
    path = run.path / "metrics.jsonl"
    for step in (1, 2):
        run.append_metrics(step, "train", {"loss/total": 0.5})
    whole = path.read_bytes()
    start = whole.index(b"\n") + 1
    for length in range(start, len(whole)):
        path.write_bytes(whole[:length])
        complete = length == len(whole) - 1  # only the line break is missing
        run.append_metrics(3, "train", {})
        expected = [1, 2, 3] if complete else [1, 3]
        assert [row["step"] for row in run.read_metrics()] == expected, length
        path.write_bytes(whole[:length])
        run.truncate_metrics(2)
        assert path.read_bytes() == (whole if complete else whole[:start]), length


def test_lines_that_are_no_rows_are_passed_over(run: RunDirectory) -> None:
    (run.path / "metrics.jsonl").write_bytes(b'[1]\n\xff\xfe\n"x"\n{"split":"a"}\n\n{"step":4}\n')
    assert run.read_metrics() == [{"step": 4}]


def test_syncing_metrics_that_do_not_exist_yet_is_nothing(run: RunDirectory) -> None:
    run.sync_metrics()
    assert not (run.path / "metrics.jsonl").exists()
    run.append_metrics(1, "train", {})
    run.sync_metrics()
    assert len(run.read_metrics()) == 1
