"""Processes that share one run, as a test starts them."""

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# The command line, without pictures, which take longest, and with a disturbance that a test may ask for.
DRIVER = """
import os, signal, sys
import spd_hydra.pipeline, spd_hydra.result, spd_hydra.run
from spd_hydra.cli import main
from spd_hydra.trainer import Trainer
spd_hydra.pipeline.draw_all = spd_hydra.result.draw_all = lambda *arguments: []
rank = int(os.environ.get("RANK", "0"))
exec(os.environ.get("DISTURB", ""))
sys.argv[0] = "spd-run"
sys.exit(main())
"""

AT_STEP = """
take_step = Trainer.train_step
def disturbed_step(self):
    if rank == {rank} and self.step == {step}:
        {act}
    return take_step(self)
Trainer.train_step = disturbed_step
"""


class Ended(NamedTuple):
    """What a process came to."""

    code: int
    out: str
    err: str


def at_step(rank: int, step: int, act: str) -> str:
    """A disturbance: a statement that runs on one rank before one of its steps."""
    return AT_STEP.format(rank=rank, step=step, act=act)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def begin(
    folder: Path,
    words: list[str],
    *,
    size: int = 2,
    disturb: str = "",
    own_session: bool = False,
    **more: str,
) -> list[subprocess.Popen[str]]:
    """Start the ranks of one run in a folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SPD_", "SLURM_"))}
    shared = {
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, *words],
            cwd=folder,
            env=kept
            | {"OMP_NUM_THREADS": "1", "DISTURB": disturb, **more}
            | (shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if size > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=own_session,
        )
        for rank in range(size)
    ]


def ends(processes: list[subprocess.Popen[str]], timeout: float = 120) -> list[Ended]:
    """Wait for the ranks, all of which must end."""
    try:
        told = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [Ended(p.returncode, out, err) for p, (out, err) in zip(processes, told, strict=True)]


def wait_until(
    condition: Callable[[], Any], processes: list[subprocess.Popen[str]], seconds: float = 60
) -> None:
    """Wait for something that running processes will do."""
    deadline = time.monotonic() + seconds
    while not condition():
        ended = [p.communicate() for p in processes if p.poll() is not None]
        assert not ended, f"ended before it came to that: {ended}"
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.02)


def directory_in(folder: Path) -> Path:
    """The only run directory below a folder."""
    (path,) = folder.glob("outputs/*/*/config.yaml")
    return path.parent


def status_of(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "status.json").read_text())
    return found


def rows_of(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


# Plays histories, each a list of moments in which a rank gets a signal. Every rank of every attempt is a
# fork, so that one import of torch serves them all. A moment is the number of a training step or of a file
# operation in the run's directory, counted in one attempt.
STAGE = """
import dataclasses, json, os, signal, socket, sys, traceback
from pathlib import Path
import torch._dynamo  # takes seconds, and every attempt would import it again
import spd_hydra.pipeline, spd_hydra.result, spd_hydra.run
from spd_hydra.composition import compose
from spd_hydra.saved_config import load_config
from spd_hydra.run import run
from spd_hydra.stop import Stopped
from spd_hydra.trainer import Trainer

out, words, histories, size = json.loads(sys.argv[1])
spd_hydra.pipeline.draw_all = spd_hydra.result.draw_all = lambda *arguments: []
take_step = Trainer.train_step
counted, doom = {"files": 0, "steps": 0}, {}

def count(what):
    counted[what] += 1
    if counted[what] == doom.get(what):
        os.kill(os.getpid(), doom["signal"])

def heard(event, arguments):
    if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") and out in str(arguments[0]):
        count("files")

def counting_step(self):
    count("steps")
    return take_step(self)

signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests were started by nohup
sys.addaudithook(heard)
Trainer.train_step = counting_step

def attempt(directory, root):
    if directory is None:
        return run(compose([*words, f"out_dir={root}"]))
    return run(dataclasses.replace(load_config(directory / "config.yaml"), resume=str(directory)))

def requeue(number, frame):
    (root / "requeued").write_text(str(os.environ.get("RANK", "0")))
    sys.exit(75)

def play(rank, moment, port, directory):
    os.environ.update(WORLD_SIZE=str(size), RANK=str(rank), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(size),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if moment.get("requeues"):
        signal.signal(signal.SIGUSR2, requeue)
    if moment.get("rank") == rank:
        doom.update(moment)
    attempt(directory, root)
    (Path(out) / f"files_{rank}").write_text(str(counted["files"]))

for name, moments in histories.items():
    root = Path(out) / name
    for moment in [*moments, {}]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        directory = next((path.parent for path in root.glob("*/*/config.yaml")), None)
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                try:
                    play(rank, moment, port, directory)
                    code = 0
                except Stopped as stopped:
                    code = stopped.exit_code
                except SystemExit as ended:
                    code = ended.code
                except BaseException:
                    traceback.print_exc()
                    code = 1
                sys.stdout.flush()
                os._exit(code)
            children.append(child)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        status = next((json.loads(p.read_text()) for p in root.glob("*/*/status.json")), {})
        print(json.dumps({"history": name, "moment": moment, "codes": codes, "status": status}), flush=True)
    done = [path for path in root.glob("*/*/summary.json")]
    assert len(done) == 1, name
"""


def play(
    folder: Path, words: list[str], histories: dict[str, list[dict[str, Any]]], *, size: int = 2
) -> dict[str, list[dict[str, Any]]]:
    """Run every history below `folder/runs/<name>`; for each, how its attempts ended, the last one whole."""
    done = subprocess.run(
        [sys.executable, "-c", STAGE, json.dumps([str(folder / "runs"), words, histories, size])],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"history"')]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in histories}
    for row in told:
        found[row["history"]].append(row)
    for name, attempts in found.items():
        assert len(attempts) == len(histories[name]) + 1
        assert attempts[-1]["codes"] == [0] * size, (name, done.stderr)
    return found


def result_in(root: Path) -> dict[str, Any]:
    """Everything that must not depend on how the only run below a folder came to its end."""
    (summary_file,) = root.rglob("summary.json")
    directory = summary_file.parent
    summary = json.loads(summary_file.read_text())
    newest = directory / "checkpoints" / f"step_{summary['steps']}"
    found: dict[str, Any] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.glob("*.safetensors")
    }
    for changing in ("seconds", "steps_per_second"):
        del summary[changing]
    del summary["target"]["cached"]
    return found | {
        "summary": summary,
        "metrics": rows_of(directory),
        "status": status_of(directory)["status"],
    }
