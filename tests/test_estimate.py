"""What a step is said to need is what it takes."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tests.data.reader import save_byte_tokenizer
from tests.model.tiny_hf import SMALL
from torch.utils.flop_counter import FlopCounterMode

from spd_hydra import estimate as estimates
from spd_hydra.build import assemble, untrained_target
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.decomposition.subcomponents import Init
from spd_hydra.estimate import Way
from spd_hydra.hardware import Gpu, Rates, peak_rates
from spd_hydra.precision import Precision
from spd_hydra.preflight import preflight
from spd_hydra.simulation import Needs, planned_peak, simulate
from spd_hydra.trainer import Trainer

Toy = Callable[..., RunConfig]
Make = Callable[..., Trainer]
CPU = torch.device("cpu")


def needs_of(config: RunConfig) -> Needs:
    return simulate(preflight(config), rows=config.train.batch_size, device=CPU)


def shown(
    needs: Needs,
    *,
    way: Way = Way.uncompiled,
    planned: int | None = None,
    ranks: int = 1,
    rates: Rates | None = None,
) -> estimates.Estimate:
    return estimates.Estimate(needs=needs, way=way, planned=planned, ranks=ranks, device=CPU, rates=rates)


def most_bytes_in_a_step(trainer: Trainer) -> int:
    """Parameters, target, gradients, moments, and what the allocator gives out in a step."""
    for _ in range(2):
        trainer.train_step()
    trained = sum(p.numel() for p in trainer.updates.components + trainer.updates.ci_fn)
    frozen = sum(p.numel() for p in trainer.model.target.parameters())
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as seen:
        trainer.train_step()
    assert seen.profiler is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return 4 * (4 * trained + frozen) + int(max(itertools.accumulate(sizes)))


ADVERSARY = ["loss.persistent_pgd_recon.coeff=1", "loss.persistent_pgd_recon.ascents=3"]
LARGE = ["train.batch_size=2048", "train.log_every=1000"]
VARIANTS = {
    "all terms": ["loss.stochastic_recon_subset.coeff=1", "loss.faithfulness.coeff=1"],
    "in parts": ["train.accumulate=4"],
    "recomputed": ["train.checkpoint_activations=true"],
    "against an adversary": ["loss.persistent_pgd_recon.coeff=1", "loss.persistent_pgd_recon.ascents=3"],
    "in bf16": ["train.precision=bf16"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_predicted_peak_is_that_of_a_step(make: Make, variant: str) -> None:
    words = [*LARGE, *VARIANTS[variant]]
    measured = most_bytes_in_a_step(make(*words, steps=1000))
    needs = needs_of(compose(["debug=smoke", "device=cpu", *words]))
    assert needs.peak == pytest.approx(measured, rel=0.2)


def test_parameters_are_counted_once(toy: Toy) -> None:
    needs = needs_of(toy("train.batch_size=8"))
    # Tied: V [5, 20] and U [20, 2] once; per site 20 private MLPs of 16 hidden units. W [2, 5] and a bias.
    trained, frozen = 20 * (5 + 2) + 2 * 20 * (3 * 16 + 1), 10 + 5
    assert (needs.trained, needs.frozen) == (trained, frozen)
    batches = 8 * 4  # left over from building, at most
    assert 0 <= needs.resident - 4 * (4 * trained + frozen) <= 4 * 2 * 11 + 4096 + batches


@pytest.mark.parametrize("more", [[], ADVERSARY], ids=["", "ascents"])
def test_operations_are_those_of_a_real_step(make: Make, more: list[str]) -> None:
    words = ["train.batch_size=64", "train.log_every=1000", *more]
    trainer = make(*words, steps=1000)
    trainer.train_step()
    with FlopCounterMode(display=False) as counter:
        trainer.train_step()
    assert needs_of(compose(["debug=smoke", "device=cpu", *words])).flops == counter.get_total_flops()


@pytest.mark.parametrize("more", [[], ADVERSARY], ids=["", "ascents"])
def test_parts_need_less_memory_for_the_same_operations(toy: Toy, more: list[str]) -> None:
    whole, parts = (
        needs_of(toy("train.batch_size=4096", "ci_fn=shared_mlp", f"train.accumulate={number}", *more))
        for number in (1, 8)
    )
    assert parts.peak < whole.peak / 4
    assert parts.flops == whole.flops


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_mask_tokens_change_nothing_of_what_a_step_takes(streaming: str, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_byte_tokenizer(tmp_path / "model"))
    tokenizer.mask_token = "~"
    tokenizer.save_pretrained(tmp_path / "model")
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**(SMALL | {"vocab_size": 257})))
    bert.save_pretrained(tmp_path / "model")
    (tmp_path / "a.txt").write_text("\n\n".join(f"paragraph {number} of a text" for number in range(50)))
    words = [
        *("experiment=lm_hf", f"model.name={tmp_path / 'model'}", "model.auto_class=masked_lm", "ci_fn=mlp"),
        *(f"data.name={tmp_path / 'a.txt'}", "data.length=16", f"data.streaming={streaming}", "device=cpu"),
        *(f"cache_dir={tmp_path / 'cache'}", "decomposition.C=4", "train.batch_size=4"),
    ]
    masked, plain = (needs_of(compose([*words, f"data.mask_fraction={share}"])) for share in ("null", "0"))
    assert masked == plain
    assert masked.flops > 0


def test_the_parts_are_as_they_were(toy: Toy) -> None:
    config = toy("train.batch_size=8", "decomposition.init=inputs", "decomposition.tied={}")
    assert config.decomposition.init is Init.inputs
    made = assemble(config, untrained_target(config), CPU)
    before = {name: (id(p), p.clone()) for name, p in made.model.named_parameters()}
    roots = made.model.roots
    simulate(made, rows=8, device=CPU)
    assert made.model.roots == roots
    for name, parameter in made.model.named_parameters():
        identity, value = before[name]
        assert id(parameter) == identity
        assert torch.equal(parameter, value)
        assert parameter.grad is None


def test_the_least_time_is_that_of_the_slower_of_products_and_memory() -> None:
    needs = Needs(trained=1, frozen=1, resident=1, peak=1, flops=6_000, moved=1_000)
    for matmul, copy, seconds in ((3_000, 1_000, 2.0), (6_000, 250, 4.0)):
        rates = Rates(matmul=matmul, copy=copy)
        assert shown(needs, rates=rates).seconds == seconds


def test_what_people_read() -> None:
    needs = Needs(
        trained=1_234_567, frozen=89, resident=3 * 2**20, peak=5 * 2**30, flops=4_200_000_000, moved=10
    )
    rates = Rates(matmul=2.1e12, copy=4e10)
    assert shown(needs, way=Way.whole, planned=2**30, ranks=2, rates=rates).lines() == [
        "parameters: 1,234,567 trained, 89 frozen",
        "memory of each of 2 ranks: 3.0 MiB for parameters, gradients and AdamW's moments, 1.0 GiB at the "
        "peak of a compiled step",
        "arithmetic of each of 2 ranks: 4.2 GFLOP per step in matrix products",
        "time: at least 2 ms per step on this cpu (2.1 TFLOP/s, 40 GB/s), if everything ran as fast as "
        "matrix products",
    ]
    by_block = shown(needs, way=Way.blocks, planned=2**30).lines()
    assert by_block[1].endswith("1.0 GiB at the peak of a step compiled block by block")
    assert by_block[-1] == (
        "time: this machine has no GPU to measure; name one, e.g. check.device=H100, or run task=check there"
    )
    assert shown(needs).lines()[1].endswith("5.0 GiB at the peak of an uncompiled step")
    unknown = shown(needs, way=Way.whole, planned=None).lines()[1]
    assert unknown.endswith(
        "5.0 GiB at the peak of an uncompiled step; not known of a compiled step, as the run takes it"
    )


def test_the_expected_time_of_a_model_of_text_is_that_of_its_products_at_the_share_others_reached() -> None:
    needs = Needs(trained=1, frozen=1, resident=1, peak=1, flops=67_000_000_000_000, moved=335)
    model = dataclasses.replace(
        shown(needs, way=Way.whole, planned=1, rates=peak_rates(Gpu.H100, Precision.fp32)),
        gpu=Gpu.H100,
        reads_tokens=True,
    )
    # 67 TFLOP take an H100 a second at 67 TFLOP/s, and 1 / 0.7 of it at 70 % of that
    assert model.lines()[-2:] == [
        "time: at least 1,000 ms per step on an H100 by its data sheet (67 TFLOP/s, 3.35 TB/s), if "
        "everything ran as fast as matrix products",
        "time: 1,429 ms to 3,448 ms per step, from the 29% to 70% of that rate at which a compiled step of "
        "small language models ran on two CPUs (docs/performance.md)",
    ]
    assert model.expected == pytest.approx((1 / 0.7, 1 / 0.29))
    assert dataclasses.replace(model, way=Way.blocks).expected == pytest.approx((1 / 0.53, 1 / 0.17))
    assert dataclasses.replace(model, reads_tokens=False).expected is None
    short = dataclasses.replace(model.needs, flops=model.needs.flops // 1000, moved=0)
    assert dataclasses.replace(model, needs=short).expected is None  # about 2 ms of arithmetic
    moves = dataclasses.replace(needs, moved=10 * 3_350_000_000_000)
    memory = dataclasses.replace(model, needs=moves)
    assert memory.expected is None  # memory is what takes longer
    half = dataclasses.replace(model, rates=peak_rates(Gpu.H100, Precision.bf16), fp32=67e12)
    assert half.expected == pytest.approx((67 / 989 / 0.7, 1 / 0.29))
    assert "from the 29% to 70% of the rate of float32 to that rate at which" in half.lines()[-1]


@pytest.mark.parametrize(("precision", "rate"), [("fp32", 19.5e12), ("tf32", 156e12), ("bf16", 312e12)])
def test_a_named_gpu_stands_for_this_machine(toy: Toy, precision: str, rate: float) -> None:
    config = toy("train.batch_size=8", "check.device=A100", f"train.precision={precision}")
    found = estimates.estimate(config, preflight(config))
    assert found.rates == (rate, 2.04e12)
    assert "on an A100 by its data sheet" in found.lines()[-1]


def test_facts_say_of_which_step_the_peak_is() -> None:
    needs = Needs(trained=1, frozen=1, resident=1, peak=9, flops=1, moved=1)

    def facts(way: Way, planned: int | None) -> tuple[int, str, int]:
        found = shown(needs, way=way, planned=planned).facts()
        return found["peak_bytes"], found["peak_is_of"], found["uncompiled_peak_bytes"]

    assert facts(Way.uncompiled, None) == (9, "an uncompiled step", 9)
    assert facts(Way.whole, 5) == (5, "a compiled step", 9)
    assert facts(Way.blocks, 6) == (6, "a step compiled block by block", 9)
    assert facts(Way.whole, None) == (9, "an uncompiled step", 9)


def test_a_compiler_that_cannot_plan_leaves_the_peak_of_an_uncompiled_step(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def other_version(*arguments: object) -> None:
        raise TypeError("compute_memory_timeline() takes 4 positional arguments\nbut 3 were given")

    monkeypatch.setattr(estimates, "measure", lambda device, precision: Rates(matmul=1, copy=1))
    monkeypatch.setattr(estimates, "can_compile", lambda device: True)
    monkeypatch.setattr("torch._inductor.memory.compute_memory_timeline", other_version)
    config = toy("train.batch_size=8", "train.compile=true")
    found = estimates.estimate(config, preflight(config))
    assert found.peak == (found.needs.peak, Way.uncompiled)
    assert found.lines()[1].endswith("not known of a compiled step, as the run takes it")
    (line,) = [r.getMessage() for r in caplog.records if r.name == "spd_hydra.estimate"]
    assert line.startswith("the peak memory of a compiled step is not known")
    assert "compute_memory_timeline() takes 4" in line
    assert "\n" not in line


def test_the_plan_of_a_toy_is_below_its_uncompiled_step_and_starts_no_process(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError(f"started {arguments}")

    config = toy("train.batch_size=2048", "train.compile=true")
    parts = preflight(config)
    state = parts.model.roots, parts.model.compiled_blocks
    monkeypatch.setattr("subprocess.Popen.__init__", refuse)
    planned = planned_peak(parts, rows=2048, device=CPU)
    needs = needs_of(config)
    assert needs.resident < planned < needs.peak / 2
    assert (parts.model.roots, parts.model.compiled_blocks) == state


def test_every_rank_has_its_share_and_every_replica_its_own(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = Rates(matmul=1, copy=1)
    monkeypatch.setattr(estimates, "measure", lambda device, precision: rates)

    def flops(*words: str) -> int:
        config = toy("train.batch_size=64", *words)
        return estimates.estimate(config, preflight(config)).needs.flops

    alone = flops()
    assert flops("launcher.ranks_per_node=2") == alone / 2
    with monkeypatch.context() as as_rank:
        as_rank.setenv("WORLD_SIZE", "4")
        assert flops() == alone / 4
    assert flops("train.replicas=3") == 3 * flops()


def test_what_ranks_share_out_is_counted_once_over_all_of_them(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = 4
    rates = Rates(matmul=1, copy=1)
    monkeypatch.setattr(estimates, "measure", lambda device, precision: rates)

    def needs(*words: str) -> Needs:
        config = toy("train.batch_size=8", f"launcher.ranks_per_node={ranks}", *words)
        return estimates.estimate(config, preflight(config)).needs

    for words in ([], ["train.accumulate=2"]):
        whole, shared = needs(*words), needs("train.shard=optimizer", *words)
        saved = 3 * 4 * whole.trained * (ranks - 1) / ranks  # gradients and two moments
        assert whole.resident - shared.resident == pytest.approx(saved, rel=0.01)
        moments = 2 * 4 * whole.trained * (ranks - 1) / ranks  # whole gradients are there at the peak
        assert whole.peak - shared.peak >= 0.95 * moments
        assert shared.flops == whole.flops
        assert shared.moved < whole.moved


@pytest.mark.parametrize("precision", Precision)
def test_rates_of_this_machine_are_positive(monkeypatch: pytest.MonkeyPatch, precision: Precision) -> None:
    monkeypatch.setattr(estimates, "_SECONDS", 0.0)
    rates = estimates.measure(CPU, precision)
    assert rates.matmul > 1e6
    assert rates.copy > 1e6
