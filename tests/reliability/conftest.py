"""`spd-run` many times over, each in a process and under conditions of its own, after one import of torch."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Every case is a fork, with the words of a command line and the folder it is called in. `file_bytes` is the
# largest size of a file; `disk_bytes` that of the file system that the folder is, copied to `<folder>.copy`
# in the end; `obeys_modes` takes from root what nobody else may, to write where the mode forbids it;
# `vanishes` is a pattern: as soon as something in the folder matches it, the run directory is removed.
DRIVER = """
import concurrent.futures, ctypes, json, os, pathlib, resource, shutil, subprocess, sys, time, traceback
import matplotlib.backends.backend_agg, spd_hydra.cli_run, torch._dynamo, wandb
from spd_hydra.cli import main

def give_away_dac_override():
    libc = ctypes.CDLL(None)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    sets[0], sets[1] = sets[0] & ~2, sets[1] & ~2  # of the effective and the permitted capabilities
    assert libc.capset(header, sets) == 0

def begin(case, output):
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(case["folder"])
    if case["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (case["file_bytes"],) * 2)
    if case["obeys_modes"]:
        give_away_dac_override()
    sys.argv = ["spd-run", *case["words"]]
    code = 97
    try:
        code = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

def wait(child, case):
    while case["vanishes"]:
        found = next(pathlib.Path(case["folder"]).glob(case["vanishes"]), None)
        if found is not None:
            run = next(path for path in found.parents if (path / "config.yaml").exists())
            while run.exists():
                shutil.rmtree(run, ignore_errors=True)
            break
        time.sleep(0.005)
    began = time.monotonic()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.monotonic() - began

for case in json.loads(sys.stdin.read()):
    folder = pathlib.Path(case["folder"])
    if case["disk_bytes"] is not None:
        options = f"size={case['disk_bytes']},mode=777"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    told, output = os.pipe()  # a limit on files holds for a file of output too
    child = os.fork()
    if child == 0:
        begin(case, output)
    os.close(output)
    with concurrent.futures.ThreadPoolExecutor(1) as readers, open(told, errors="replace") as stream:
        text = readers.submit(stream.read)
        code, seconds = wait(child, case)
        text = text.result()
    if case["disk_bytes"] is not None:
        shutil.copytree(folder, folder.with_name(folder.name + ".copy"), symlinks=True)
        subprocess.run(["umount", folder], check=True)
    print("RESULT", json.dumps({"code": code, "text": text, "seconds": seconds}), flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Ended:
    """What a case came to; `seconds` since it was started, or since its directory vanished."""

    code: int
    text: str
    seconds: float


Call = Callable[..., list[Ended]]
DEFAULTS = {"file_bytes": None, "disk_bytes": None, "obeys_modes": False, "vanishes": None}


@pytest.fixture
def call_all() -> Call:
    """Call `spd-run` once per case, one after another; `before` are words to start their driver with."""

    def call(cases: list[dict[str, Any]], *before: str, **variables: str) -> list[Ended]:
        for case in cases:
            Path(case["folder"]).mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SPD_", "WANDB_"))}
        done = subprocess.run(
            [*before, sys.executable, "-c", DRIVER],
            input=json.dumps([DEFAULTS | case for case in cases], default=str),
            env=kept | {"OMP_NUM_THREADS": "1"} | variables,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        return [Ended(**json.loads(line.removeprefix("RESULT "))) for line in lines]

    return call
