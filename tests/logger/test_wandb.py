"""The wandb logger: what it records, read back from its file, and that nothing it does stops a run."""

import json
import logging
import os
import pty
import select
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from PIL import Image

from spd_hydra.logger.base import Logger
from spd_hydra.logger.files import Files
from spd_hydra.logger.wandb import Mode, Wandb, _run_id

CANARY = "canary-4711-canary"
KEY = "a1" * 20
_BLOCK, _HEADER = 32768, 7


@pytest.fixture(autouse=True)
def _no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the account nor the settings of whoever runs the tests, and no server anywhere."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


class FakeSettings(SimpleNamespace):
    model_fields: ClassVar[dict[str, object]] = {"finish_timeout": None}


class FakeRun:
    """Stands for wandb and for its run; raises where told to, and remembers the calls."""

    def __init__(self, failing: str = "", hang_seconds: float = 0.0) -> None:
        self.failing, self.hang_seconds = failing, hang_seconds
        self.calls: list[tuple[Any, ...]] = []
        self.url, self.dir, self.summary = "", "a/b", self
        self.Settings = FakeSettings

    def _call(self, *call: Any) -> None:
        self.calls.append(call)
        if call[0] == self.failing:
            raise ConnectionError(f"no route to {call[0]}")

    def init(self, **arguments: Any) -> "FakeRun":
        self._call("init", arguments)
        return self

    def log(self, values: dict[str, Any], step: int) -> None:
        self._call("log", values, step)

    def Image(self, path: str) -> str:
        self._call("Image", path)
        return path

    def update(self, summary: dict[str, Any]) -> None:
        self._call("update", summary)

    def finish(self, exit_code: int) -> None:
        time.sleep(self.hang_seconds)
        self._call("finish", exit_code)


def drive(logger: Logger) -> None:
    """What a run does with its logger."""
    logger.log(1, "train", {"loss/total": 0.5})
    logger.log(1, "eval", {"l0/embed": 0.25})
    logger.log_figures(1, {"polygon": Path("polygon.png")})
    logger.finish({"solved": True}, 0)


def records(path: Path) -> list[Any]:
    """The records of a finished run: wandb's own process may write the last ones after `finish` returned."""
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline:
        found = read_records(path)
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.05)
    raise AssertionError("the record was never finished")


def read_records(path: Path) -> list[Any]:
    """The records of a `.wandb` file: a file header, then blocks of length-prefixed fragments."""
    from wandb.proto import wandb_internal_pb2

    data, position, buffer, found = path.read_bytes(), _HEADER, b"", []
    assert data[:4] in (b":W&B", b"")
    while position + _HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", data[position : position + _HEADER])
        position += _HEADER + size
        if position > len(data):
            break  # still being written
        buffer += data[position - size : position]
        if kind in (1, 4):  # a whole record, or the last fragment of one
            found.append(wandb_internal_pb2.Record.FromString(buffer))  # type: ignore[attr-defined]
            buffer = b""
    return found


def items(record: Any) -> dict[str, Any]:
    """Keys and values of a history or summary record."""
    return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record}


def record_files(run_dir: Path) -> list[Path]:
    return sorted((run_dir / "wandb").glob("*run-*/*.wandb"))


# ---- for real, offline ---------------------------------------------------------------------------------


def test_an_offline_record_holds_metrics_figures_summary_and_config_and_no_secret(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setattr(sys, "argv", ["spd-run", f"x.token={CANARY}"])
    Image.new("RGB", (8, 4)).save(run_dir / "polygon.png")
    config = {"train": {"lr": 1e-5, "steps": 10}, "logger": {"api_key": CANARY}, "note": f"uses {CANARY}"}
    spec = Wandb(mode=Mode.offline, project="toys", group="sweep", tags=["a", "b"])
    with caplog.at_level(logging.INFO):
        logger = spec.start(run_dir, "tms_5-2", config)
    logger.log(0, "train", {"loss/total": 0.5})
    logger.log(10, "train", {"loss/total": 0.25})
    logger.log(10, "eval", {"l0/embed": 1.5})
    logger.log_figures(10, {"polygon": run_dir / "polygon.png"})
    logger.finish({"solved": True, "alive": {"embed": 5}, "mmcs": 0.999}, 0)

    (file,) = record_files(run_dir)
    found = records(file)
    run = next(record.run for record in found if record.HasField("run"))
    assert (run.project, run.run_group, run.display_name) == ("toys", "sweep", "tms_5-2")
    assert list(run.tags) == ["a", "b"]
    assert run.run_id == json.loads((run_dir / "wandb.json").read_text())["id"]
    sent = {update.key: json.loads(update.value_json) for update in run.config.update}
    assert sent["train"] == {"lr": 1e-5, "steps": 10}
    assert sent["logger"] == {"api_key": "<redacted>"}

    history = [items(record.history.item) for record in found if record.HasField("history")]
    assert [row["_step"] for row in history] == [0, 10]
    assert history[0]["train/loss/total"] == 0.5
    assert (history[1]["train/loss/total"], history[1]["eval/l0/embed"]) == (0.25, 1.5)
    assert history[1]["figures/polygon/_type"] == "image-file"
    assert (history[1]["figures/polygon/width"], history[1]["figures/polygon/height"]) == (8, 4)
    assert len(list(file.parent.rglob("polygon*.png"))) == 1
    summary: dict[str, Any] = {}
    for record in found:
        if record.HasField("summary"):
            summary |= items(record.summary.update)
    assert (summary["solved"], summary["alive"], summary["mmcs"]) == (True, {"embed": 5}, 0.999)
    assert [record.exit.exit_code for record in found if record.HasField("exit")] == [0]

    assert str(file.parent) in caplog.text, "says what to give to `wandb sync`"
    everything = b"".join(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    assert CANARY.encode() not in everything


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "taken"),
    [
        ({"WANDB_RUN_ID": "abcd1234", "WANDB_SWEEP_ID": "s1"}, True),
        ({"WANDB_RUN_ID": "abcd1234"}, False),
        ({}, False),
    ],
)
def test_a_wandb_sweep_gives_a_new_run_its_id_and_a_resumed_one_keeps_its_own(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], taken: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    first = _run_id(run_dir)
    assert (first == "abcd1234") is taken
    monkeypatch.setenv("WANDB_RUN_ID", "another1")
    assert _run_id(run_dir) == first


def test_a_resumed_run_goes_on_in_the_same_record(run_dir: Path) -> None:
    for step in (1, 2):
        logger = Wandb(mode=Mode.offline).start(run_dir, "a", {})
        logger.log(step, "train", {"x": float(step)})
        logger.finish(None, 1 if step == 1 else 0)
    identity = json.loads((run_dir / "wandb.json").read_text())["id"]
    runs = [
        record.run for file in record_files(run_dir) for record in records(file) if record.HasField("run")
    ]
    assert {run.run_id for run in runs} == {identity}


@pytest.mark.slow
def test_runs_of_one_process_do_not_share_a_record(tmp_path: Path) -> None:
    identities = set()
    loggers = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        loggers.append(Wandb(mode=Mode.offline).start(tmp_path / name, name, {}))
        identities.add(json.loads((tmp_path / name / "wandb.json").read_text())["id"])
    for logger, name in zip(loggers, ("one", "two"), strict=True):
        logger.log(1, "train", {name: 1.0})
        logger.finish(None, 0)
    assert len(identities) == 2
    for name in ("one", "two"):
        (file,) = record_files(tmp_path / name)
        rows = [items(record.history.item) for record in records(file) if record.HasField("history")]
        assert [set(row) & {"train/one", "train/two"} for row in rows] == [{f"train/{name}"}]


# ---- the mode ------------------------------------------------------------------------------------------


def mode_used(monkeypatch: pytest.MonkeyPatch, run_dir: Path, spec: Wandb) -> str | None:
    """The mode in which wandb is begun, without beginning it."""
    import wandb

    fake = FakeRun()
    monkeypatch.setattr(wandb, "init", fake.init)
    spec.start(run_dir, "a", {})
    return fake.calls[0][1]["mode"] if fake.calls else None


def test_online_without_a_key_is_one_warning_and_offline(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert mode_used(monkeypatch, run_dir, Wandb()) == "offline"
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "no wandb key (set WANDB_API_KEY" in warnings[0]


def test_online_with_a_dead_server_is_one_warning_and_offline(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setattr("spd_hydra.logger.wandb._server_of", lambda settings: "http://127.0.0.1:9")
    assert mode_used(monkeypatch, run_dir, Wandb()) == "offline"
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == [
        "wandb records this run offline: http://127.0.0.1:9 does not answer"
    ]


@pytest.mark.parametrize("source", ["environment", "netrc"])
def test_online_with_key_and_server_stays_online(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        host = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr("spd_hydra.logger.wandb._server_of", lambda settings: f"http://{host}")
        if source == "environment":
            monkeypatch.setenv("WANDB_API_KEY", KEY)
        else:
            (tmp_path / "no-netrc").write_text(f"machine {host} login user password {KEY}\n")
        assert mode_used(monkeypatch, run_dir, Wandb()) == "online"


@pytest.mark.parametrize(
    ("value", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", None)]
)
def test_the_environment_may_switch_wandb_down(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, value: str, mode: str | None
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_MODE", value)
    assert mode_used(monkeypatch, run_dir, Wandb()) == mode


def in_process(run_dir: Path, spec: str) -> list[str]:
    script = (
        "import logging, sys; from pathlib import Path; logging.basicConfig(level=logging.WARNING)\n"
        "from spd_hydra.logger.wandb import Mode, Wandb, _run_id\n"
        f"logger = {spec}.start(Path(sys.argv[1]), 'a', {{}})\n"
        "logger.log(1, 'train', {'x': 1.0}); logger.finish({'a': 1}, 0); print('finished')\n"
    )
    return [sys.executable, "-c", script, str(run_dir)]


@pytest.mark.slow
def test_on_a_terminal_without_a_key_nothing_is_asked(run_dir: Path) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        in_process(run_dir, "Wandb()"), stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    output = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([controller], [], [], 0.2)[0]:
            try:
                output += os.read(controller, 65536)
            except OSError:  # how Linux says that the other side has ended
                break
    process.wait(5)
    os.close(controller)
    assert process.returncode == 0, output
    assert b"finished" in output
    assert b"choice" not in output
    assert output.count(b"WARNING") == 1


@pytest.mark.slow
def test_a_server_that_accepts_and_never_answers_costs_no_more_than_the_time_limit(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        began = time.monotonic()
        command = in_process(run_dir, "Wandb(init_timeout=2.0, finish_timeout=2.0)")
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "finished" in done.stdout
    assert done.stderr.count("WARNING:spd_hydra") == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert KEY not in done.stderr
    assert time.monotonic() - began < 20


# ---- wandb in trouble ----------------------------------------------------------------------------------


def start_fake(monkeypatch: pytest.MonkeyPatch, run_dir: Path, fake: FakeRun, **options: Any) -> Logger:
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return Wandb(mode=Mode.offline, **options).start(run_dir, "a", {"x": 1})


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("failing", ["log", "Image", "update", "finish"])
def test_whatever_raises_training_goes_on_after_one_warning(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    fake = FakeRun(failing)
    logger = start_fake(monkeypatch, run_dir, fake)
    drive(logger)
    (warning,) = warnings_of(caplog)
    assert f"ConnectionError: no route to {failing}" in warning
    assert "Training goes on" in warning
    assert fake.calls[-1] == ("finish", 0), "later calls are still tried, and the end is always said"


def test_when_wandb_cannot_begin_training_goes_on_after_one_warning(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeRun("init")
    drive(start_fake(monkeypatch, run_dir, fake))
    (warning,) = warnings_of(caplog)
    assert "no route to init" in warning
    assert [call[0] for call in fake.calls] == ["init"]


def test_without_wandb_installed_training_goes_on_after_one_warning(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    drive(Wandb().start(run_dir, "a", {}))
    (warning,) = warnings_of(caplog)
    assert "wandb could not be started" in warning


def test_the_end_is_said_once_with_its_exit_code(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRun()
    logger = start_fake(monkeypatch, run_dir, fake)
    logger.finish(None, 1)
    logger.finish({"late": True}, 0)
    assert fake.calls[1:] == [("finish", 1)]


def test_an_end_that_hangs_is_left_behind_after_its_time(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("spd_hydra.logger.wandb._GRACE_SECONDS", 0.1)
    logger = start_fake(monkeypatch, run_dir, FakeRun(hang_seconds=3.0), finish_timeout=0.1)
    began = time.monotonic()
    logger.finish(None, 0)
    assert time.monotonic() - began < 1.0
    assert "did not end within 0.1 s" in warnings_of(caplog)[0]


def test_rows_and_figures_carry_their_step_and_split(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeRun()
    drive(start_fake(monkeypatch, run_dir, fake))
    assert [call for call in fake.calls if call[0] == "log"] == [
        ("log", {"train/loss/total": 0.5}, 1),
        ("log", {"eval/l0/embed": 0.25}, 1),
        ("log", {"figures/polygon": "polygon.png"}, 1),
    ]


def test_the_id_survives_in_the_run_directory_and_a_torn_one_is_replaced(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeRun()
    for _ in range(2):
        start_fake(monkeypatch, run_dir, fake)
    first, second = (call[1]["id"] for call in fake.calls)
    assert first == second
    (run_dir / "wandb.json").write_text('{"id": ')
    start_fake(monkeypatch, run_dir, fake)
    assert fake.calls[-1][1]["id"] != first
    assert fake.calls[-1][1]["dir"] == str(run_dir)


def test_importing_the_logger_does_not_import_wandb() -> None:
    code = "import sys, spd_hydra.logger.wandb; print('wandb' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_the_default_logger_leaves_nothing_but_the_files(run_dir: Path) -> None:
    drive(Files().start(run_dir, "a", {}))
    assert list(run_dir.iterdir()) == []
