"""Where a step cannot be compiled one line says so, and the run comes to the same result."""

import logging
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from spd_hydra import compiling
from spd_hydra.compiling import Kernel, can_compile, compiled_by, graph_compiler, mending_files
from spd_hydra.config import RunConfig
from spd_hydra.run import run


@pytest.fixture(autouse=True)
def _asked_anew() -> Iterator[None]:
    can_compile.cache_clear()
    yield
    can_compile.cache_clear()


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "spd_hydra.compiling"]


@pytest.mark.usefixtures("no_compiler")
def test_a_missing_compiler_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    assert not can_compile("cpu")
    assert not can_compile("cpu")
    (line,) = warnings_in(caplog)
    assert "no C++ compiler" in line
    assert "uncompiled" in line
    assert "\n" not in line


def test_the_compiler_that_cxx_names_is_the_one_that_counts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not can_compile("cpu")
    assert "no-such-compiler" in warnings_in(caplog)[0]


def test_a_compiler_without_python_s_headers_is_not_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = tmp_path / "compiler"
    compiler.touch(mode=0o755)
    monkeypatch.setenv("CXX", str(compiler))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    for folder, possible in [(tmp_path, False), (tmp_path / "include", True)]:
        monkeypatch.setattr(sysconfig, "get_path", {"include": str(folder)}.__getitem__)
        can_compile.cache_clear()
        assert can_compile("cpu") is possible
    (line,) = warnings_in(caplog)
    assert "Python.h" in line


def test_a_gpu_needs_triton(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert not can_compile("cuda")
    assert "Triton" in warnings_in(caplog)[0]


@pytest.mark.usefixtures("no_compiler")
def test_a_run_without_a_compiler_equals_one_that_is_not_compiled(
    toy: Callable[..., RunConfig], caplog: pytest.LogCaptureFixture
) -> None:
    metrics = []
    with caplog.at_level(logging.WARNING):
        for compile in ("true", "false"):
            outcome = run(toy("train.steps=5", f"train.compile={compile}"))
            assert outcome.run_dir is not None
            metrics.append((outcome.run_dir / "metrics.jsonl").read_bytes())
    assert metrics[0] == metrics[1]
    assert len(warnings_in(caplog)) == 1


def test_a_kernel_is_traced_without_values() -> None:
    given: list[type] = []

    def doubled(x: Tensor) -> Tensor:
        given.append(type(x))
        return 2 * x

    x = torch.arange(3.0)
    with compiled_by(lambda graph, inputs, **settings: graph):
        kernel = Kernel(doubled)
        assert torch.equal(kernel(x), 2 * x)
        assert torch.equal(kernel(x + 1), 2 * (x + 1))
    assert given == [FakeTensor]


def test_what_asks_for_values_runs_uncompiled_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    def halved_while_large(x: Tensor) -> Tensor:
        while x.max() > 1:
            x = x / 2
        return x

    kernel = Kernel(halved_while_large)
    for x in (torch.tensor([6.0]), torch.tensor([1.0])):
        assert torch.equal(kernel(x), halved_while_large(x))
    assert len(warnings_in(caplog)) == 1
    assert (
        "the step runs uncompiled, which is slower; with train.compile_blocks=true" in warnings_in(caplog)[0]
    )


def test_other_errors_while_tracing_are_raised() -> None:
    def adds_unequal(x: Tensor) -> Tensor:
        return x + torch.ones(7)

    with pytest.raises(RuntimeError, match="broadcast"):
        Kernel(adds_unequal)(torch.ones(3))


class Vectors:
    """Vector instructions that work or do not, and whether they were tried."""

    def __init__(self, name: str, *, work: bool = True) -> None:
        self.name, self.work, self.tried = name, work, False

    def __str__(self) -> str:
        return self.name

    def __bool__(self) -> bool:
        self.tried = True
        return self.work


@pytest.mark.parametrize(
    ("known", "capability", "tried", "taken"),
    [
        ([Vectors("avx512 vnni"), Vectors("avx512"), Vectors("avx2")], None, "avx512", "avx512"),
        ([Vectors("avx512", work=False), Vectors("avx2")], None, "avx512 avx2", "avx2"),
        ([Vectors("avx2")], None, "avx2", "avx2"),
        ([Vectors("neon")], None, "", "as before"),
        ([Vectors("avx512"), Vectors("avx2")], "avx2", "", "as before"),
    ],
)
def test_the_compiler_tries_no_more_vector_instructions_than_it_needs(
    known: list[Vectors],
    capability: str | None,
    tried: str,
    taken: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from torch._inductor import cpu_vec_isa

    names = [vectors.name for vectors in known if vectors.name != "neon"]
    monkeypatch.setattr(cpu_vec_isa, "supported_vec_isa_list", known)
    monkeypatch.setattr(cpu_vec_isa, "x86_isa_checker", lambda: names)
    monkeypatch.setattr(cpu_vec_isa, "valid_vec_isa_list", lambda: ["as before"])
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    if capability is not None:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    compiling._try_few_vectors.cache_clear()
    graph_compiler()
    assert " ".join(vectors.name for vectors in known if vectors.tried) == tried
    assert [str(vectors) for vectors in cpu_vec_isa.valid_vec_isa_list()] == [taken]


def test_a_kernel_of_a_step_uses_vector_instructions_where_the_processor_has_some() -> None:
    from torch._inductor import cpu_vec_isa

    compiling._try_few_vectors.cache_clear()
    assert torch.equal(Kernel(torch.add)(torch.ones(64), torch.ones(64)), torch.full((64,), 2.0))
    widest = {"avx512": 512, "avx2": 256}
    for name, bits in widest.items():
        if name in cpu_vec_isa.x86_isa_checker():
            assert cpu_vec_isa.pick_vec_isa().bit_width() == bits
            return
    pytest.skip("not an x86 processor")


@pytest.mark.slow
def test_the_command_works_on_a_machine_without_a_compiler(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("spd-run"), "debug=smoke", "train.compile=true"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count("no C++ compiler") == 1


LOADED = """
import logging
import torch
from spd_hydra.compiling import Kernel
from spd_hydra.decomposition.compiled_blocks import CompiledBlocks

logging.basicConfig(level=logging.INFO, format="%(message)s")
x = torch.arange(64.0).requires_grad_()
(y,) = CompiledBlocks()("a block", lambda x: (x.sin(),), x)
(gradient,) = torch.autograd.grad(y.sum(), x)
assert torch.allclose(gradient, x.cos(), atol=1e-6)
assert torch.equal(Kernel(torch.add)(torch.ones(64), torch.ones(64)), torch.full((64,), 2.0))
"""


@pytest.mark.slow
def test_what_a_process_left_that_was_killed_while_it_compiled_is_compiled_again(tmp_path: Path) -> None:
    def said() -> str:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", LOADED], env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    assert "compiling again" not in said()
    kernels = list(tmp_path.rglob("*.main.so"))
    assert len(kernels) >= 3  # of the block, of its backward pass, and of the sum
    for is_listed in (True, False):  # in the compiler's own records, which a killed process did not write
        for kernel in kernels:
            os.truncate(kernel, 100)
        for records in [] if is_listed else ["fxgraph", "aotautograd"]:
            shutil.rmtree(tmp_path / records)
        text = said()
        assert all(str(kernel) in text for kernel in kernels)
        assert "slower" not in text
    assert "compiling again" not in said()


def test_what_else_goes_wrong_while_compiling_is_told(tmp_path: Path) -> None:
    other = tmp_path / "other.so"  # of somebody else
    other.touch()

    def fails() -> None:
        raise ImportError("cannot read file data", path=str(other))

    with pytest.raises(ImportError, match="cannot read"):
        mending_files(fails)
    assert other.exists()
