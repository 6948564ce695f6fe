"""What is decomposed, typed for a model of Hugging Face: through Hydra, up to the parts of the run."""

import json
from pathlib import Path

import pytest
import transformers
from tests.cli.conftest import Call
from tests.model.tiny_hf import VOCAB, saved_model, tokens

MLP = "decomposition.sites.mlp.pattern=transformer.h.*.mlp.*"
SHAPES = {
    f"transformer.h.{block}.mlp.{name}": shape
    for block in "01"
    for name, shape in (("c_fc", "128 x 32"), ("c_proj", "32 x 128"))
}


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    """A model of two blocks and a few texts of token ids."""
    saved_model("gpt2", tmp_path / "model")
    text = tmp_path / "ids.jsonl"
    text.write_text("\n".join(json.dumps({"ids": row}) for row in tokens(rows=40).tolist()))
    return [
        *("experiment=lm_hf", f"model.name={tmp_path / 'model'}", f"data.name={text}", "device=cpu"),
        *("data.token_column=ids", "data.length=12", f"data.cache_dir={tmp_path}", "data.eval_fraction=0.5"),
        *("ci_fn.hidden=[4]", "train.batch_size=4", "train.compile=false", "eval.batch_size=4"),
    ]


@pytest.fixture
def with_experts(tmp_path: Path) -> Path:
    """A model of which a block's experts are two tensors."""
    small = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    config = transformers.MixtralConfig(**small, **heads, max_position_embeddings=32)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "experts")
    return tmp_path / "experts"


def listed(out: str) -> list[str]:
    """The lines of sites in what task=check says."""
    return [line.strip() for line in out.splitlines() if ", C = " in line]


def test_a_pattern_of_ones_own_is_all_that_is_decomposed(spd_run: Call, words: list[str]) -> None:
    ended = spd_run("task=check", *words, MLP)
    assert ended.code == 0, ended.err
    assert listed(ended.out + ended.err) == [f"{site}: {shape}, C = 512" for site, shape in SHAPES.items()]


def test_without_a_pattern_every_matrix_of_the_blocks_is_decomposed(spd_run: Call, words: list[str]) -> None:
    ended = spd_run("task=check", *words, "decomposition.C=5")
    assert len(listed(ended.out + ended.err)) == 8
    assert all(line.endswith("C = 5") for line in listed(ended.out + ended.err))


def test_what_cannot_be_decomposed_in_the_blocks_is_said(
    spd_run: Call, words: list[str], with_experts: Path
) -> None:
    ended = spd_run("task=check", *words, f"model.name={with_experts}", "decomposition.C=5")
    assert ended.code == 0, ended.err
    (line,) = [line for line in (ended.out + ended.err).splitlines() if "not decomposed" in line]
    assert "6 tensors" in line
    assert "model.layers.*.mlp.experts.gate_up_proj (MixtralExperts)" in line
    assert "not decomposed" not in "".join(spd_run("task=check", *words, MLP)[1:])


def test_kl_of_hidden_units_is_remarked_on(spd_run: Call, words: list[str]) -> None:
    base = ["task=check", *words, "model.auto_class=base", "decomposition.default_pattern=h.*.mlp.*"]
    told = [spd_run(*base, *more) for more in ([], ["loss.divergence=kl"])]
    assert [
        (ended.code, "loss.divergence: kl takes the softmax" in ended.out + ended.err) for ended in told
    ] == [
        (0, False),
        (0, True),
    ]


def test_a_number_of_a_new_entry_can_be_swept(spd_run: Call, words: list[str]) -> None:
    ended = spd_run("-m", "task=check", *words, MLP, "decomposition.sites.mlp.C=8,16")
    assert ended.code == 0, ended.err
    assert listed(ended.out + ended.err) == [
        f"{site}: {shape}, C = {C}" for C in (8, 16) for site, shape in SHAPES.items()
    ]


def test_the_configuration_that_is_shown_has_the_new_entry(spd_run: Call, words: list[str]) -> None:
    ended = spd_run("--cfg", "job", *words, MLP, "--package", "decomposition.sites")
    assert "pattern: transformer.h.*.mlp.*" in ended.out
