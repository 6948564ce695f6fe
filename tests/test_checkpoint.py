"""Checkpoints survive kills, full disks and damaged bytes, and give back exactly what was saved."""

import contextlib
import errno
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from spd_hydra import manifest
from spd_hydra.checkpoint import (
    CheckpointError,
    load_checkpoint,
    load_newest,
    require_whole,
    save_checkpoint,
    verify,
)

FILES = ["model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
# Every call through which a save, its tidying and its retention touch the disk.
CALLS = ["open", "write", "fsync", "close", "mkdir", "rename", "replace", "unlink", "rmdir", "scandir"]


@pytest.fixture
def quick_path(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory where there is one: thousands of saves that a kill ends, not a power cut."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


def tensors_of(step: int) -> dict[str, dict[str, torch.Tensor]]:
    value = torch.full((3, 2), float(step))
    return {"model": {"site.V": value, "site.U": -value}, "optimizer": {"0.step": torch.tensor(float(step))}}


def save(directory: Path, step: int, keep: int = 3, note: str = "") -> Path:
    return save_checkpoint(directory, step, tensors_of(step), {"step": step, "note": note}, keep)


def steps_in(directory: Path) -> set[int]:
    return {
        int(path.name.removeprefix("step_").removesuffix(".replaced")) for path in directory.glob("step_*")
    }


def refuse_warning(message: str) -> None:
    raise AssertionError(f"unexpected warning: {message}")


def all_bytes(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# ---- what goes in comes out ----------------------------------------------------------------------------


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    group = {
        "plain": base,
        "transposed": base.T,
        "shares_memory": base,
        "slice": base[1:],
        "bf16": base.to(torch.bfloat16),
        "flags": base > 3,
        "words": torch.tensor([-(2**31), 7], dtype=torch.int32),
        "scalar": torch.tensor(1 / 3, dtype=torch.float64),
        "empty": torch.zeros(0, 5),
        "odd": torch.tensor([math.nan, math.inf, -0.0]),
        "needs_grad": torch.ones(2, requires_grad=True),
    }
    path = save_checkpoint(tmp_path, 4, {"model": group, "nothing": {}}, {}, keep=1)
    loaded = load_checkpoint(path)
    assert loaded.step == 4
    assert loaded.tensors["nothing"] == {}
    assert loaded.tensors["model"].keys() == group.keys()
    for name, expected in group.items():
        found = loaded.tensors["model"][name]
        assert found.dtype == expected.dtype, name
        assert found.shape == expected.shape, name
        assert torch.equal(found.nan_to_num(7.0), expected.detach().nan_to_num(7.0)), name
    assert math.copysign(1.0, loaded.tensors["model"]["odd"][2].item()) == -1.0


def test_tensors_come_back_in_the_order_of_their_names(tmp_path: Path) -> None:
    group = {f"w{number}": torch.zeros(1) for number in random.sample(range(100, 200), 100)}
    path = save_checkpoint(tmp_path, 0, {"model": group}, {}, keep=1)
    assert list(load_checkpoint(path).tensors["model"]) == sorted(group)


def test_state_comes_back_exactly(tmp_path: Path) -> None:
    state = {
        "float": [0.1, 1e-300, 5e-324, 1.7976931348623157e308, -0.0, 1 / 3, math.inf],
        "int": [0, -1, 2**80],
        "bool": [True, False],
        "text": 'β → \u2028 \x00 "quoted"',
        "none": None,
        "nested": {"a": {"b": [[], {}, [1, 2.0]]}},
    }
    loaded = load_checkpoint(save_checkpoint(tmp_path, 0, {}, state, keep=1)).state
    assert loaded == state
    assert repr(loaded) == repr(state)


@pytest.mark.parametrize(
    ("state", "key"),
    [
        ({"a": {"b": [1, (2, 3)]}}, r"state\.a\.b\[1\]: tuple"),
        ({"a": torch.ones(1)}, r"state\.a: Tensor"),
        ({"a": {3: 1}}, r"state\.a: the key 3"),
        ({"a": Path("x")}, r"state\.a: "),
    ],
)
def test_state_that_would_come_back_changed_is_refused_before_anything_is_written(
    tmp_path: Path, state: dict[str, Any], key: str
) -> None:
    with pytest.raises(TypeError, match=key):
        save_checkpoint(tmp_path / "checkpoints", 1, {}, state, keep=1)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden", "/absolute"])
def test_a_file_name_that_leaves_the_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="cannot be the name"):
        save_checkpoint(tmp_path / "c", 1, {name: {}}, {}, keep=1)
    assert not (tmp_path / "c").exists()


def test_the_newest_is_the_largest_step_not_the_last_name(tmp_path: Path) -> None:
    for step in [9, 10, 100, 20]:
        save(tmp_path, step, keep=9)
    newest = load_newest(tmp_path, refuse_warning)
    assert newest is not None
    assert newest.step == 100
    assert torch.equal(newest.tensors["model"]["site.V"], torch.full((3, 2), 100.0))


def test_without_checkpoints_there_is_nothing_to_load(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "missing", refuse_warning) is None
    (tmp_path / ".tmp_host_1_00000000").mkdir()
    (tmp_path / "step_x").mkdir()
    assert load_newest(tmp_path, refuse_warning) is None


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert sorted(p.name for p in path.iterdir()) == sorted(FILES)
    for file in path.iterdir():
        if file.suffix == ".safetensors":
            header_size = int.from_bytes(file.read_bytes()[:8], "little")
            assert json.loads(file.read_bytes()[8 : 8 + header_size])
        else:
            assert json.loads(file.read_bytes())


def test_files_obey_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path / "c", 1)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o750
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o640}


# ---- damage --------------------------------------------------------------------------------------------


def cut_to(fraction: float) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, int(path.stat().st_size * fraction))


def flip_one_bit(path: Path, position: int | None = None, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if position is None else position] ^= 1 << bit
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "empty": cut_to(0.0),
    "half": cut_to(0.5),
    "one byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "one byte more": lambda path: os.truncate(path, path.stat().st_size + 1),
    "one bit flipped": flip_one_bit,
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_to_every_file_is_named_and_the_checkpoint_before_is_used(
    tmp_path: Path, file: str, damage: str
) -> None:
    save(tmp_path, 1)
    DAMAGES[damage](save(tmp_path, 2) / file)
    warnings: list[str] = []
    loaded = load_newest(tmp_path, warnings.append)
    assert loaded is not None
    assert loaded.step == 1
    assert len(warnings) == 1
    assert "step_2" in warnings[0]
    assert file in warnings[0]
    assert "step_1" in warnings[0]
    assert any(file in problem for problem in verify(tmp_path / "step_2"))
    assert verify(tmp_path / "step_1") == []


def test_any_bit_of_any_file_flipped_is_detected(quick_path: Path) -> None:
    path = save_checkpoint(quick_path, 2, {"model": {"a": torch.ones(1)}}, {"x": 0.5}, keep=1)
    for file in path.iterdir():
        original = file.read_bytes()
        for position in range(len(original)):
            for bit in range(8):
                flip_one_bit(file, position, bit)
                assert verify(path), (file.name, position, bit)
                file.write_bytes(original)
    assert verify(path) == []


def test_a_checkpoint_under_another_step_s_name_is_detected(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step_1", tmp_path / "step_7")
    assert "step_7" in verify(tmp_path / "step_7")[0]
    loaded = load_newest(tmp_path, lambda message: None)
    assert loaded is not None
    assert loaded.step == 1


def test_when_every_checkpoint_is_damaged_loading_fails_and_changes_nothing(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_one_bit(save(tmp_path, step) / "model.safetensors")
    before = all_bytes(tmp_path)
    with pytest.raises(CheckpointError, match="none is whole") as caught:
        load_newest(tmp_path, refuse_warning)
    assert all(name in str(caught.value) for name in ("step_1", "step_2", "model.safetensors", "sha256"))
    assert all_bytes(tmp_path) == before


def test_a_manifest_cannot_lead_outside_its_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    (tmp_path / "outside.safetensors").write_bytes((path / "model.safetensors").read_bytes())
    content = json.loads((path / "manifest.json").read_text())
    content.pop("digest")
    content["files"]["../outside.safetensors"] = content["files"]["model.safetensors"]
    (path / "manifest.json").write_bytes(manifest._sealed(content))
    assert "outside its directory" in verify(path)[0]


@pytest.mark.parametrize("entry", [None, "sha256", {}, {"bytes": 4}, {"sha256": "0"}])
def test_a_manifest_without_size_and_digest_of_a_file_is_refused(tmp_path: Path, entry: Any) -> None:
    path = save(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())
    content.pop("digest")
    content["files"]["model.safetensors"] = entry
    (path / "manifest.json").write_bytes(manifest._sealed(content))
    with pytest.raises(CheckpointError, match="without their size and digest"):
        load_checkpoint(path)


def test_checkpoints_without_a_state_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())
    content.pop("digest")
    del content["files"]["state.json"]
    (path / "manifest.json").write_bytes(manifest._sealed(content))
    with pytest.raises(CheckpointError, match=r"it has no state\.json"):
        load_checkpoint(path)


def test_a_whole_checkpoint_is_required_only_where_there_are_any(tmp_path: Path) -> None:
    require_whole(tmp_path / "missing")
    require_whole(tmp_path)
    save(tmp_path, 1)
    flip_one_bit(save(tmp_path, 2) / "state.json")
    require_whole(tmp_path)
    flip_one_bit(tmp_path / "step_1" / "state.json")
    with pytest.raises(CheckpointError, match=r"(?s)2 checkpoints and none is whole.*step_2 .*step_1 "):
        require_whole(tmp_path)


def test_a_run_directory_that_was_removed_stays_removed(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file or directory; there is none from before"):
        save(tmp_path / "gone" / "checkpoints", 1)
    assert list(tmp_path.iterdir()) == []


def test_a_newer_format_is_refused_by_its_number(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    content = json.loads((path / "manifest.json").read_text())
    content.pop("digest")
    content["format"] = 2
    (path / "manifest.json").write_bytes(manifest._sealed(content))
    assert "format 2" in verify(path)[0]


# ---- interruption --------------------------------------------------------------------------------------


@contextmanager
def interrupt_at(count: int, act: Callable[[str], None]) -> Iterator[list[str]]:
    """Call `act` in place of the `count`-th call to the disk; the list records every call made."""
    made: list[str] = []
    originals = {name: getattr(os, name) for name in CALLS}

    def wrap(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            if len(made) - 1 == count:
                if name == "write":  # half of the bytes get out before the end
                    originals["write"](args[0], bytes(args[1])[: len(args[1]) // 2])
                act(name)
            return originals[name](*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, wrap(name))
    try:
        yield made
    finally:
        for name, original in originals.items():
            setattr(os, name, original)


def kill_self(name: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail_with_full_disk(name: str) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def prepare_busy_directory(directory: Path, again: bool) -> int:
    """Two checkpoints, leftovers of a dead writer; the step to save next: a new one or the newest again."""
    save(directory, 1)
    save(directory, 2, note="before")
    leftover = directory / f".tmp_{socket.gethostname()}_{dead_pid()}_0123abcd"
    leftover.mkdir()
    (leftover / "state.json").write_text("{")
    return 2 if again else 3


def dead_pid() -> int:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step again"])
def test_killed_at_any_call_to_the_disk_a_whole_checkpoint_is_there(quick_path: Path, again: bool) -> None:
    count = 0
    while True:
        directory = quick_path / str(count)
        step = prepare_busy_directory(directory, again)
        pid = os.fork()
        if pid == 0:
            try:
                with interrupt_at(count, kill_self):
                    save(directory, step, keep=2, note="after")
            finally:
                os._exit(0)
        _, status = os.waitpid(pid, 0)

        loaded = load_newest(directory, refuse_warning)
        assert loaded is not None, count
        assert loaded.step in {2, step}, count
        assert torch.equal(loaded.tensors["model"]["site.V"], torch.full((3, 2), float(loaded.step)))
        assert all(verify(path) == [] for path in directory.glob("step_*")), count

        save(directory, step + 1, keep=2)  # the next save tidies up whatever was left behind
        assert steps_in(directory) == {step, step + 1} or steps_in(directory) == {2, step + 1}, count
        assert not list(directory.glob(".tmp_*")), count
        if not os.WIFSIGNALED(status):
            assert loaded.step == step
            assert loaded.state["note"] == "after"
            break
        count += 1
    assert count > 30, "the save was expected to touch the disk often"


@pytest.mark.parametrize("again", [False, True], ids=["new step", "same step again"])
def test_a_failing_call_to_the_disk_leaves_the_previous_checkpoint_and_no_rubbish(
    quick_path: Path, again: bool
) -> None:
    count, messages = 0, list[str]()
    while True:
        directory = quick_path / str(count)
        step = prepare_busy_directory(directory, again)
        with interrupt_at(count, fail_with_full_disk) as made:
            try:
                save(directory, step, keep=2)
            except CheckpointError as error:
                messages.append(
                    str(error).removeprefix(f"cannot write checkpoint {directory / f'step_{step}'}")
                )
        loaded = load_newest(directory, refuse_warning)
        assert loaded is not None, count
        assert loaded.step in {2, step}, count
        save(directory, step + 1, keep=2)
        assert not list(directory.glob(".tmp_*")), count
        if len(made) <= count:
            break
        count += 1
    assert len(messages) > 20
    assert all(message.startswith(": No space left on device; step_") for message in messages)


def test_an_interrupt_from_the_keyboard_removes_the_temporary_directory(tmp_path: Path) -> None:
    def interrupt(name: str) -> None:
        raise KeyboardInterrupt

    save(tmp_path, 1)
    with pytest.raises(KeyboardInterrupt), interrupt_at(6, interrupt):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


def test_every_file_is_on_the_disk_before_the_checkpoint_gets_its_name(tmp_path: Path) -> None:
    save(tmp_path, 1)
    with interrupt_at(-1, kill_self) as made:
        save(tmp_path, 2)
    before, after = made[: made.index("rename")], made[made.index("rename") + 1 :]
    assert before.count("fsync") == len(FILES) + 1, "each file and the directory that holds them"
    assert before[-2:] == ["fsync", "close"]
    assert after[:2] == ["open", "fsync"], "the directory that holds the new name"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_file_that_may_not_grow_leaves_the_previous_checkpoint_and_a_clear_error(tmp_path: Path) -> None:
    save(tmp_path, 1)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            save_checkpoint(tmp_path, 2, {"model": {"big": torch.zeros(10_000)}}, {}, keep=2)
        except CheckpointError as error:
            os.write(write_end, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    message = os.read(read_end, 10_000).decode()
    os.close(read_end)
    os.close(write_end)
    assert "File too large" in message
    assert "step_1, written before, is whole" in message
    assert "Make room" in message
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    assert verify(tmp_path / "step_1") == []


def test_the_temporary_directory_of_a_living_writer_is_left_alone(tmp_path: Path) -> None:
    alive = tmp_path / f".tmp_{socket.gethostname()}_{os.getppid()}_0123abcd"
    elsewhere = tmp_path / ".tmp_another-machine_77_0123abcd"
    old_elsewhere = tmp_path / ".tmp_another-machine_78_0123abcd"
    for path in (alive, elsewhere, old_elsewhere):
        path.mkdir()
    os.utime(old_elsewhere, (0, 0))
    save(tmp_path, 1)
    assert alive.exists()
    assert elsewhere.exists()
    assert not old_elsewhere.exists()


# ---- retention -----------------------------------------------------------------------------------------


def test_the_newest_are_kept_and_damaged_ones_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=9)
    flip_one_bit(tmp_path / "step_3" / "state.json")
    save(tmp_path, 4, keep=2)
    assert steps_in(tmp_path) == {2, 3, 4}, "3 is damaged, so 2 is the second that counts"
    save(tmp_path, 5, keep=2)
    assert steps_in(tmp_path) == {4, 5}


def random_history(directory: Path, rng: random.Random) -> int:
    """Saves, kills inside saves, full disks and damage, after each of which a whole checkpoint is there."""
    save(directory, rng.randint(0, 9), keep=rng.randint(1, 4))
    for _ in range(rng.randint(2, 6)):
        whole = [path for path in directory.glob("step_*") if not verify(path)]
        step, keep = rng.randint(0, 99), rng.randint(1, 4)
        what = rng.choice(["save", "kill", "full", "damage"])
        if what == "damage" and len(whole) > 1:  # the last whole one is taken away by nobody but a disk
            DAMAGES[rng.choice(sorted(DAMAGES))](rng.choice(whole) / rng.choice(FILES))
        elif what == "kill":
            pid = os.fork()
            if pid == 0:
                try:
                    with interrupt_at(rng.randint(0, 60), kill_self):
                        save(directory, step, keep=keep)
                finally:
                    os._exit(0)
            os.waitpid(pid, 0)
        elif what == "full":
            with interrupt_at(rng.randint(0, 60), fail_with_full_disk), contextlib.suppress(CheckpointError):
                save(directory, step, keep=keep)
        else:
            save(directory, step, keep=keep)
            assert verify(directory / f"step_{step}") == []
        assert any(not verify(path) for path in directory.glob("step_*")), what
    assert load_newest(directory, lambda message: None) is not None
    return len(list(directory.glob("step_*")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_in_a_thousand_random_histories_a_whole_checkpoint_is_always_left(quick_path: Path) -> None:
    rng, left = random.Random(0), []
    for number in range(1000):
        left.append(random_history(quick_path / str(number), rng))
        shutil.rmtree(quick_path / str(number))
    assert min(left) == 1
    assert max(left) > 3


def test_what_was_just_written_is_never_removed(tmp_path: Path) -> None:
    save(tmp_path, 100)
    save(tmp_path, 50, keep=1)
    assert 50 in steps_in(tmp_path)


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5, note="first")
    save(tmp_path, 5, note="second")
    loaded = load_newest(tmp_path, refuse_warning)
    assert loaded is not None
    assert loaded.state["note"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["step_5"]


@pytest.mark.parametrize(("step", "keep"), [(-1, 1), (0, 0), (0, -3)])
def test_impossible_numbers_are_refused(tmp_path: Path, step: int, keep: int) -> None:
    with pytest.raises(ValueError, match="must be"):
        save(tmp_path, step, keep=keep)


def test_in_random_histories_the_newest_whole_checkpoint_is_always_found(
    quick_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # 1000 histories; durability is tested above
    for seed in range(1000):
        rng, directory = random.Random(seed), quick_path / str(seed)
        keep, step, whole = rng.randint(1, 3), 0, set[int]()
        for _ in range(rng.randint(1, 6)):
            action = rng.random()
            if action < 0.7 or not whole:
                step += rng.choice([0, 1, 10]) if whole else 1
                save_checkpoint(directory, step, {}, {"step": step}, keep)
                whole.add(step)
                whole = set(sorted(whole)[-keep:])
            elif action < 0.9 and len(whole) > 1:
                victim = rng.choice(sorted(whole))
                rng.choice(list(DAMAGES.values()))(directory / f"step_{victim}" / "state.json")
                whole.discard(victim)
            else:
                (directory / f".tmp_{socket.gethostname()}_{os.getpid()}_{rng.getrandbits(32):08x}").mkdir()
            found = load_newest(directory, lambda message: None)
            assert found is not None, seed
            assert found.step == max(whole), seed
            assert {n for n in steps_in(directory) if not verify(directory / f"step_{n}")} == whole, seed
        shutil.rmtree(directory)
