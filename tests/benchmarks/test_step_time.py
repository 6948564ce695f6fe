import re
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import markdown, step_page
from benchmarks.step_cases import TOLERANCE, Case, Sample, Variant, differences, example, make
from benchmarks.step_memory import hidden_bytes, measure
from benchmarks.step_time import complaints, time_case, with_others

DENSE = "data.feature_probability=0.3"  # a few rows of sparse data hold no active feature at all
TINY = {
    "tms_5-2@64": ["decomposition.sites.unembed.C=20"],
    "tms_5-2-untied@48": ["decomposition.sites.embed.C=7", "decomposition.sites.unembed.C=11"],
    "tms_5-2-id@32": ["loss.faithfulness.coeff=0.5"],
    "tms_40-10@16": ["decomposition.sites.embed.C=12", "decomposition.sites.unembed.C=12"],
    "resid_mlp1@16": ["model.d_embed=30", "model.n_features=8", "model.d_mlp=5", "ci_fn.hidden=3", DENSE],
    "resid_mlp2@16": [
        "model.d_embed=30",
        "model.n_features=8",
        "ci_fn=shared_mlp",
        "ci_fn.hidden=[7,5]",
        DENSE,
    ],
    "resid_mlp2@24": [
        "model.d_embed=20",
        "ci_fn=vector_mlp",
        "loss.stochastic_recon_subset.coeff=0.5",
        DENSE,
    ],
    "resid_mlp3@16": ["model.d_embed=30", "model.n_features=8", "loss.importance_minimality.beta=0.5", DENSE],
    "resid_mlp3@12": [
        "model.d_embed=30",
        "model.n_features=8",
        "loss.importance_minimality={coeff:1,warmup:0,squeeze:3,squeeze_from:0}",
        DENSE,
    ],
    "tms_40-10-id@16": ["loss.stochastic_recon_subset.coeff=1.5"],
    "resid_mlp2@20": [
        "model.d_embed=20",
        "loss.pgd_recon_subset.coeff=0.7",
        "loss.pgd_recon_layerwise.coeff=0.4",
        "loss.pgd_recon_layerwise.n_steps=3",
        "loss.pgd_recon_layerwise.step_size=0.3",
        DENSE,
    ],
}


@pytest.mark.parametrize("case", TINY)
def test_the_plain_step_has_the_losses_and_gradients_of_the_eager_step(case: str) -> None:
    config = Case.read(case).config(TINY[case])
    eager, plain = make("eager", config), make("plain", config)
    losses, gradients = differences(eager, plain, example(config))
    assert max(losses.values()) <= TOLERANCE
    assert max(gradients.values()) <= TOLERANCE
    assert {
        "total",
        "stochastic_recon",
        "stochastic_recon_layerwise",
        "importance_minimality",
    } <= losses.keys()
    assert len(gradients) >= 10


def test_a_second_step_still_agrees_so_the_updates_were_the_same() -> None:
    config = Case.read("tms_5-2@64").config(["train.lr_schedule.kind=constant"])
    eager, plain = make("eager", config), make("plain", config)
    sample = example(config)
    differences(eager, plain, sample)
    losses, _ = differences(eager, plain, sample)
    assert max(losses.values()) <= TOLERANCE


def test_a_difference_counts_relative_to_the_size_of_the_plain_number() -> None:
    class Fixed(Variant):
        def __init__(self, loss: float, gradient: list[float]) -> None:
            self._found = ({"total": loss}, {"V": torch.tensor(gradient)})

        def losses_and_gradients(self, sample: Sample) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
            return self._found

    sample = (torch.zeros(1), torch.zeros(1))
    losses, gradients = differences(Fixed(1.5, [3.0, 0.0]), Fixed(2.0, [3.0, 4.0]), sample)
    assert losses == {"total": 0.25}
    assert gradients == {"V": pytest.approx(0.8)}
    losses, gradients = differences(Fixed(0.0, [1.0]), Fixed(0.0, [0.0]), sample)
    assert (losses, gradients) == ({"total": 0.0}, {"V": float("inf")})


def test_a_gradient_that_only_one_variant_has_counts_as_different() -> None:
    config = Case.read("tms_5-2@16").config()
    tied, untied = make("eager", config), make("plain", Case.read("tms_5-2-untied@16").config())
    _, gradients = differences(tied, untied, example(config))
    assert gradients["subcomponents.unembed.V"] == float("inf")


def test_the_plain_step_draws_sparse_features_and_as_many_sources_as_its_losses_take() -> None:
    from benchmarks.plain_step import PlainStep
    from benchmarks.step_cases import parts_of

    config = Case.read("resid_mlp1@4096").config(["model.d_embed=20", "model.n_features=30"])
    batch, draws = PlainStep(parts_of(config, compiled=False)).sample()
    assert batch.shape == (4096, 30)
    assert draws.shape == example(config)[1].shape
    assert (batch != 0).float().mean().item() == pytest.approx(0.01, rel=0.2)
    assert batch.min() < -0.9
    assert 0 <= draws.min() <= draws.max() < 1


def test_a_setting_that_the_plain_step_does_not_know_is_named() -> None:
    config = Case.read("tms_5-2@16").config(["loss.ci_masked_recon.coeff=1"])
    with pytest.raises(ValueError, match="tms_5-2: the plain step needs stochastic masks"):
        make("plain", config)
    config = Case.read("tms_5-2@16").config(["loss.persistent_pgd_recon.coeff=1"])
    with pytest.raises(ValueError, match="tms_5-2: the plain step needs no lasting adversary"):
        make("plain", config)


def test_the_plain_step_makes_the_hidden_tensor_which_the_memory_table_looks_for() -> None:
    config = Case.read("tms_5-2@512").config()
    assert hidden_bytes(config) == 4 * 512 * 20 * 16
    memory = measure(make("plain", config))
    assert memory.largest == hidden_bytes(config)
    assert memory.allocated > memory.largest
    assert memory.process >= memory.before > 0


def _result(loss: float, largest: int) -> dict[str, Any]:
    memory = {"process": 2**30, "before": 2**29, "allocated": 2**20, "largest": largest}
    return {
        "command": "the command",
        "rates": {"matmul": 1e10, "activations": 1e9, "copy_memory": 1e10, "copy_cache": 2**20 * 1e4,
                  "copied": 2**28},
        "environment": {"cpu": "a processor", "cpu_count": 2, "threads": 1, "torch": "2", "python": "3"},
        "cases": [{
            "case": "tms_5-2@64", "batch_size": 64, "C": {"embed": 20, "unembed": 20},
            "agreement": {"eager": {"losses": {"total": loss}, "gradients": {"V": 2e-7}}},
            "work": {"eager": {"matmul_flops": 3_000_000, "activations": 500_000, "bytes": 2**20},
                     "plain": {"matmul_flops": 5_000_000, "activations": 500_000, "bytes": 2**20}},
            "shape": {"m_k_n": (64, 5, 20), "matmul": 2e9},
            "ms": {name: {"best": ms, "median": 2 * ms, "rounds": 3}
                   for name, ms in {"compiled": 2.0, "eager": 9.0, "plain": 7.0}.items()},
        }],
        "memory": [{"case": "tms_5-2@64", "hidden_bytes": 2**19,
                    "bytes": dict.fromkeys(("compiled", "eager", "plain"), memory)}],
    }  # fmt: skip


def test_a_page_keeps_the_section_that_another_program_wrote_and_replaces_its_own() -> None:
    page = "# Page\n\nText.\n\n## One\n\nold\n\n## Two\n\nrest\n"
    assert markdown.section(page, "One") == "## One\n\nold\n\n"
    assert markdown.section(page, "Three") == ""
    replaced = markdown.with_section(page, "One", "## One\n\nnew\n")
    assert replaced == "# Page\n\nText.\n\n## Two\n\nrest\n\n## One\n\nnew\n"
    assert markdown.with_section(replaced, "One", "## One\n\nnew\n") == replaced
    assert markdown.with_section("# Page\n", "One", "") == "# Page\n"


def test_a_new_page_keeps_the_sections_of_the_other_programs() -> None:
    titles = ("Replicas", "Time to the known answer", "Language models", "Predicted memory")
    before = "\n\n".join(["# Page", "## Memory\n\nold", *(f"## {title}\n\nof it" for title in titles)])
    page = with_others("# Page\n\n## Memory\n\nnew\n", before)
    assert "old" not in page
    assert [title for title in titles if f"## {title}\n\nof it" in page] == list(titles)


def test_a_section_is_written_into_a_page_that_may_be_new(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    markdown.write_section(page, "One", "## One\n\nold\n")
    markdown.write_section(page, "Two", "## Two\n\nother\n")
    markdown.write_section(page, "One", "## One\n\nnew\n")
    assert page.read_text() == "## Two\n\nother\n\n## One\n\nnew\n"


def test_private_mlps_alone_have_a_hidden_tensor_to_look_for() -> None:
    assert hidden_bytes(Case.read("resid_mlp1@8").config(["ci_fn=shared_mlp"])) == 0
    result = _result(loss=0.0, largest=2**18)
    result["memory"][0]["hidden_bytes"] = 0
    result["complaints"] = complaints(result)
    assert result["complaints"] == []
    assert "| tms_5-2 | compiled | 1.0 | 100 % | 0.2 | – | 1024.0 | 512.0 |" in step_page.page(result)


def test_the_page_shows_times_ratios_and_differences() -> None:
    result = _result(loss=3e-7, largest=2**18)
    result["complaints"] = complaints(result)
    text = step_page.page(result)
    row = "| tms_5-2 | 64 | 20 | 2.00 (4.00) | 9.00 (18.00) | 7.00 (14.00) | 4.5 | 3.5 | 3.0e-07 | 2.0e-07 |"
    assert row in text
    assert "| tms_5-2 | compiled | 1.0 | 100 % | 0.2 | 0.5 | 1024.0 | 512.0 |" in text
    # 3 MFLOP at 10 GFLOP/s: 0.3 ms; half a million activations at 1 billion/s: 0.5 ms; 1 MiB: 0.1 ms.
    bound = "| tms_5-2 | 64 | 0.003 | 0.005 | 0.50 | 1.0 | 0.30 | 0.50 | 0.10 | 0.80 | 2.00 | 2.5 | 2.0 |"
    assert bound in text
    assert "10.0 GFLOP/s in square float32 matrix products, 1.00 billion activations/s" in text
    assert "`the command`" in text
    assert "wrong" not in text


def test_the_page_of_a_gpu_shows_what_graphs_save() -> None:
    result = _result(loss=0.0, largest=2**18)
    result["complaints"] = []
    assert "graphs, ms" not in step_page.page(result)
    result["cases"][0]["ms"]["graphs"] = {"best": 0.5, "median": 0.75, "rounds": 3}
    assert "| tms_5-2 | 64 | 0.500 (0.750) | 4.0 | 18.0 | 14.0 |" in step_page.page(result)


@pytest.mark.parametrize(
    ("loss", "largest", "words"),
    [
        (2e-5, 2**18, "eager and plain in float64: losses differ by 2.0e-05 in total, more than 1e-05"),
        (float("nan"), 2**18, "eager and plain in float64: losses differ by nan"),
        (0.0, 2**19, r"as large as \[batch, C, hidden\]: 524288 bytes"),
    ],
)
def test_a_disagreement_or_a_tensor_too_large_is_a_complaint(loss: float, largest: int, words: str) -> None:
    result = _result(loss, largest)
    (complaint,) = result["complaints"] = complaints(result)
    assert re.search(words, complaint)
    assert complaint in step_page.page(result)


@pytest.mark.slow
def test_the_compiled_step_agrees_and_its_time_is_measured() -> None:
    threads = torch.get_num_threads()
    found = time_case(Case.read("tms_5-2@64"), seconds=0.5)
    assert complaints({"cases": [found], "memory": []}) == []
    assert found["agreement"].keys() == {"compiled", "eager"}
    assert all(own["rounds"] >= 3 and own["best"] <= own["median"] for own in found["ms"].values())
    assert torch.get_num_threads() == threads
