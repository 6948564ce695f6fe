"""A run directory from somebody else is data: nothing in it runs code, reaches outside, or changes Hydra."""

import functools
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from spd_hydra import manifest

CallAll = Callable[..., list[Any]]

pytestmark = pytest.mark.slow


class Payload:
    """What runs a command in whoever unpickles it."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def put_into_checkpoints(run: Path, name: str, data: bytes) -> None:
    """Replace a file of every checkpoint, with a manifest that fits."""
    for checkpoint in run.glob("checkpoints/step_*"):
        (checkpoint / name).write_bytes(data)
        reseal(checkpoint, {path.name: path for path in checkpoint.iterdir() if path.name != manifest.NAME})


def reseal(checkpoint: Path, files: dict[str, Path]) -> None:
    (checkpoint / manifest.NAME).unlink()
    entries = {}
    for name, path in files.items():
        data = path.read_bytes()
        path.unlink()
        entries[name] = manifest.write_file(path, data)
    manifest.write_manifest(checkpoint, int(checkpoint.name.removeprefix("step_")), entries)


def list_nothing(run: Path) -> None:
    for checkpoint in run.glob("checkpoints/step_*"):
        reseal(checkpoint, {})


def add_to_manifests(run: Path, name: str, victim: Path) -> None:
    for checkpoint in run.glob("checkpoints/step_*"):
        own = {path.name: path for path in checkpoint.iterdir() if path.name != manifest.NAME}
        reseal(checkpoint, own | {name: victim})


def change_config(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = yaml.safe_load((run / "config.yaml").read_text())
    change(data)
    (run / "config.yaml").write_text(yaml.safe_dump(data))


def put_link(path: Path, victim: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(victim)


def move_and_link(folder: Path) -> None:
    elsewhere = folder.parent.with_name("elsewhere")
    folder.rename(elsewhere)
    folder.symlink_to(elsewhere)


def test_nothing_in_a_run_directory_runs_code_or_reaches_outside(tmp_path: Path, call_all: CallAll) -> None:
    canary, victim = tmp_path / "canary", tmp_path / "victim"
    payload = Payload(f"touch {canary}")
    plain, zipped = pickle.dumps(payload), tmp_path / "zipped"
    torch.save({"model": payload}, zipped)
    pickle.loads(plain)  # noqa: S301 (the payload works)
    assert canary.exists()
    canary.unlink()
    victim.write_text("precious\n")

    words = ["debug=smoke", "out_dir=runs", f"cache_dir={tmp_path / 'cache'}", "model.training.batch_size=64"]
    (done,) = call_all([{"folder": tmp_path / "origin", "words": words}])
    assert done.code == 0, done.text
    (origin,) = (tmp_path / "origin" / "runs").glob("*/*")
    template = tmp_path / "origin" / "run"
    origin.rename(template)

    def tag(run: Path) -> None:
        with (run / "config.yaml").open("a") as file:
            file.write(f"evil: !!python/object/apply:os.system ['touch {canary}']\n")

    weights, none_whole = "model.safetensors", "none is whole"
    attacks: dict[str, tuple[Callable[[Path], Any], int, str]] = {
        "pickle as weights": (lambda run: put_into_checkpoints(run, weights, plain), 1, none_whole),
        "archive as weights": (
            lambda run: put_into_checkpoints(run, weights, zipped.read_bytes()),
            1,
            none_whole,
        ),
        "pickle as optimiser": (
            lambda run: put_into_checkpoints(run, "optimizer.safetensors", plain),
            1,
            none_whole,
        ),
        "pickle as state": (lambda run: put_into_checkpoints(run, "state.json", plain), 1, none_whole),
        "nested state": (lambda run: put_into_checkpoints(run, "state.json", b"[" * 10**6), 1, none_whole),
        "pickle as manifest": (
            lambda run: [p.write_bytes(plain) for p in run.glob("checkpoints/*/manifest.json")],
            1,
            none_whole,
        ),
        "manifest of nothing": (lambda run: list_nothing(run), 1, "it has no state.json"),
        "manifest with ..": (
            lambda run: add_to_manifests(run, "../../../victim", victim),
            1,
            "outside its directory",
        ),
        "manifest with a root": (
            lambda run: add_to_manifests(run, str(victim), victim),
            1,
            "outside its directory",
        ),
        "pickle as target": (
            lambda run: (run / "target.safetensors").write_bytes(plain),
            1,
            "target.safetensors is damaged",
        ),
        "linked lock": (lambda run: put_link(run / ".lock", victim), 1, "levels of symbolic links"),
        "linked metrics": (
            lambda run: put_link(run / "metrics.jsonl", canary),
            1,
            "levels of symbolic links",
        ),
        "linked figures": (lambda run: move_and_link(run / "figures"), 1, "figures is a link"),
        "linked checkpoints": (lambda run: move_and_link(run / "checkpoints"), 1, "checkpoints is a link"),
        "python tag": (tag, 2, "could not determine a constructor"),
    }
    launcher = {"launcher": {"_target_": "os.system", "setup": [f"touch {canary}"]}}
    call = {"_target_": "os.system", "command": f"touch {canary}"}
    changes: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
        "hydra": (lambda data: data.update(hydra=launcher), "Key 'hydra' not in"),
        "launcher": (lambda data: data.update(launcher), "launcher: a saved configuration has none"),
        "target": (lambda data: data.update(call), "Key '_target_' not in"),
        "target in model": (lambda data: data["model"].update(call), "Key '_target_' not in"),
        "target in a site": (
            lambda data: data["decomposition"]["sites"]["embed"].update(call),
            "Key '_target_'",
        ),
        "target as a loss": (lambda data: data["loss"]["extra"].update(evil=call), "Key '_target_' not in"),
        "unknown kind": (lambda data: data["model"].update(_kind_="os/system"), "unknown kind 'os/system'"),
        "kind of another group": (
            lambda data: data.update(logger={"_kind_": "model/tms"}),
            "cannot be of kind",
        ),
        "kind among losses": (
            lambda data: data["loss"]["extra"].update(x={"_kind_": "logger/wandb"}),
            "cannot be",
        ),
        "kind of a new key": (lambda data: data.update(evil={"_kind_": "model/tms"}), "cannot be of kind"),
        "kind of the run": (lambda data: data.update(_kind_="model/tms"), "a run is of no kind"),
        "environment": (lambda data: data.update(name="${oc.env:HOME}"), "values, not references"),
    }
    for name, (change, text) in changes.items():
        attacks[name] = (functools.partial(change_config, change=change), 2, text)

    cases = []
    for number, (attack, _, _) in enumerate(attacks.values()):
        folder = tmp_path / str(number)
        shutil.copytree(template, folder / "run")
        attack(folder / "run")
        cases.append({"folder": folder, "words": ["resume=run", "train.steps=24"]})
    for (name, (_, code, text)), ended in zip(attacks.items(), call_all(cases), strict=True):
        assert ended.code == code, f"{name}: {ended.text}"
        assert re.search(re.escape(text), ended.text), f"{name}: {ended.text}"
        assert "Traceback" not in ended.text, f"{name}: {ended.text}"
        assert not canary.exists(), name
        assert victim.read_text() == "precious\n", name
    print(f"{len(attacks)} attacks refused")


def test_names_stay_inside_the_run_directory(tmp_path: Path, call_all: CallAll) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "work" / "runs").mkdir(parents=True)
    (tmp_path / "work" / "runs" / "linked").symlink_to(tmp_path / "outside")
    words = ["debug=smoke", "out_dir=runs", f"cache_dir={tmp_path / 'cache'}", "model.training.batch_size=64"]
    names = ["../../outside/x", str(tmp_path / "outside" / "x"), "linked", "a/../../../outside/x"]
    hostile_words = []
    hostile = ["--config-dir", str(tmp_path / "conf"), *words, "experiment=none", "name=odd", "model=tms_5-2"]
    (tmp_path / "conf" / "decomposition").mkdir(parents=True)
    for option, site in (("up", "../../../outside/x"), ("rooted", str(tmp_path / "outside" / "x"))):
        data = {"sites": {site: {"pattern": "embed", "C": 4}}}
        (tmp_path / "conf" / "decomposition" / f"{option}.yaml").write_text(yaml.safe_dump(data))
        hostile_words.append([*hostile, f"decomposition={option}"])
    cases = [{"folder": tmp_path / "work", "words": [*words, f"name='{name}'"]} for name in names]
    cases += [{"folder": tmp_path / "work", "words": each} for each in hostile_words]
    texts = [f"name: got {name!r}" for name in names] + ["decomposition.sites: got the name"] * 2
    for text, ended in zip(texts, call_all(cases), strict=True):
        assert ended.code == 2, ended.text
        assert text in ended.text
        assert "Traceback" not in ended.text
    assert list((tmp_path / "outside").iterdir()) == []
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["runs"]
