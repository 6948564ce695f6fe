"""What does not fit together is found before anything is trained."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.model.tiny_hf import LENGTH, SMALL, VOCAB
from torch import nn

from spd_hydra.build import assemble, untrained_target
from spd_hydra.composition import compose
from spd_hydra.config import RunConfig
from spd_hydra.model.base import TargetSpec
from spd_hydra.preflight import preflight
from spd_hydra.run import run
from spd_hydra.section import ConfigError
from spd_hydra.simulation import simulate

Toy = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decomposition.sites.embed.pattern=nowhere"], "nowhere"),
        (["model=tms_5-2", "decomposition=resid_mlp1"], "mlp_in"),
        (["decomposition.tied={embed:embed}"], "embed"),
    ],
    ids=["no such site", "sites of another target", "tied to itself"],
)
def test_what_does_not_fit_the_target_is_refused_by_name(
    toy: Toy, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(toy(*overrides))


def test_a_check_before_training_makes_no_weights(toy: Toy) -> None:
    parts = preflight(
        toy("decomposition.sites.embed.C=1000000000", "decomposition.sites.unembed.C=1000000000")
    )
    assert {parameter.device.type for parameter in parts.model.parameters()} == {"meta"}
    assert parts.model.site_shapes()["embed"].C == 1_000_000_000


def test_a_target_that_needs_values_is_checked_with_them(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy()
    build = type(config.model).build

    def with_values(spec: TargetSpec, generator: torch.Generator) -> nn.Module:
        module = build(spec, generator)
        assert next(module.parameters()).norm().item() > 0
        return module

    monkeypatch.setattr(type(config.model), "build", with_values)
    assert {p.device.type for p in preflight(config).model.parameters()} == {"cpu"}
    with pytest.raises(ConfigError, match="nowhere"):
        preflight(toy("decomposition.sites.embed.pattern=nowhere"))


def test_a_large_target_that_needs_values_is_refused_without_making_them(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2**15, 2**13, bias=False)  # 1 GiB
            self.unembed = nn.Linear(4, 4, bias=False)
            self.bias = nn.Parameter(torch.zeros(1))
            made.append(self.embed.weight.device.type)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            assert self.bias.item() == 0
            return batch

    config = toy("decomposition=tms_5-2-untied")
    monkeypatch.setattr(type(config.model), "build", lambda spec, generator: Wide())
    with pytest.raises(ConfigError) as caught:
        preflight(config)
    message = str(caught.value)
    assert re.match(
        r"model: \S+ cannot be checked without the values of its weights \(RuntimeError: ", message
    )
    assert message.endswith(
        "), which are 1.0 GiB; up to 1 GiB are made for a check. Try a small model of the same kind"
    )
    assert "\n" not in message
    assert set(made) == {"meta"}


def on_tokens(model: Any, directory: Path, *more: str) -> RunConfig:
    """A run on a model of transformers and token ids that are made here."""
    model.save_pretrained(directory / "model")
    rows = [{"input_ids": [(7 * start + n) % VOCAB for n in range(40)]} for start in range(20)]
    (directory / "ids.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"model.name={directory / 'model'}", f"data.name={directory / 'ids.jsonl'}"]
    sizes = [f"data.length={LENGTH}", "data.eval_fraction=0.3", f"cache_dir={directory / 'cache'}"]
    return compose(["experiment=lm_hf", *words, *sizes, "decomposition.C=4", "device=cpu", *more])


def test_one_class_has_no_chances_to_compare(tmp_path: Path) -> None:
    one: dict[str, Any] = {"num_labels": 1}
    model = transformers.BertForSequenceClassification(transformers.BertConfig(**SMALL, **one))
    words = ["model.auto_class=sequence_classification", "loss.divergence=kl"]
    config = on_tokens(model, tmp_path, *words)
    with pytest.raises(ConfigError) as caught:
        preflight(config)
    assert str(caught.value) == (
        "loss.divergence: got kl, but the target's output, [8, 1], has a single class, whose chance is "
        "always 1; use loss.divergence=mse"
    )
    preflight(on_tokens(model, tmp_path, words[0]))


def test_a_model_of_transformers_that_needs_more_than_tokens_is_refused(tmp_path: Path) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    vision = {name: SMALL[name] for name in sizes}
    config = transformers.CLIPConfig(
        text_config=SMALL | {"projection_dim": 16, "eos_token_id": 1},
        vision_config=vision | {"image_size": 16, "patch_size": 8},
    )
    with pytest.raises(ConfigError) as caught:
        preflight(on_tokens(transformers.CLIPModel(config), tmp_path, "model.auto_class=base"))
    assert re.fullmatch(
        rf"model\.name: got {tmp_path / 'model'}, which cannot be run on token ids alone: .*'shape'; give a "
        "model that needs nothing else",
        str(caught.value),
    )


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_text_to_evaluate_on_is_looked_at_though_nothing_has_values(tmp_path: Path, streaming: str) -> None:
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text('{"input_ids": [1, 2, 3]}\n')
    words = [f"data.eval_name={held_out}", f"data.streaming={streaming}"]
    assert preflight(on_tokens(llama, tmp_path, *words)).reads_tokens


def test_a_check_refuses_text_that_a_run_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    config = on_tokens(llama, tmp_path, "task=check", "data.eval_fraction=1e-9")
    with pytest.raises(ConfigError, match=r"^data\.eval_fraction: none of 20 documents is held out; "):
        run(config)
    assert "sound" not in capsys.readouterr().out


def test_sites_that_run_twice_are_refused_on_the_meta_device(tmp_path: Path) -> None:
    model = transformers.AlbertForMaskedLM(transformers.AlbertConfig(**SMALL, embedding_size=16))
    with pytest.raises(
        ConfigError, match=r"^decomposition\.sites: got .*which the target runs more than once"
    ):
        preflight(on_tokens(model, tmp_path, "model.auto_class=masked_lm"))


RECURRENT: dict[str, Callable[[], Any]] = {
    "lfm2": lambda: transformers.Lfm2ForCausalLM(
        transformers.Lfm2Config(**SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    ),
    "bamba": lambda: transformers.BambaForCausalLM(
        transformers.BambaConfig(
            **SMALL,
            num_key_value_heads=2,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            attn_layer_indices=[1],
        )
    ),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_large_model_with_recurrent_layers_is_checked_without_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("spd_hydra.preflight._SMALL", 0)
    config = on_tokens(RECURRENT[name](), tmp_path)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"")
    parts = preflight(config)
    assert {(type(p), p.device.type) for p in parts.model.parameters()} == {(nn.Parameter, "meta")}
    assert parts.position_shape == (LENGTH,)
    with pytest.raises(ConfigError, match="nowhere"):
        preflight(on_tokens(RECURRENT[name](), tmp_path, "decomposition.default_pattern=nowhere"))


@pytest.mark.slow
def test_what_is_checked_without_weights_needs_what_it_needs_with_them(tmp_path: Path) -> None:
    config = on_tokens(RECURRENT["lfm2"](), tmp_path)
    cpu = torch.device("cpu")
    without, with_weights = preflight(config), assemble(config, untrained_target(config), cpu)
    needs = [simulate(parts, rows=4, device=cpu) for parts in (without, with_weights)]
    assert without.model.site_shapes() == with_weights.model.site_shapes()
    assert needs[0] == needs[1]


def test_a_large_model_that_reads_values_also_where_it_is_traced_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("spd_hydra.preflight._SMALL", 0)
    sizes = {name: SMALL[name] for name in ("vocab_size", "max_position_embeddings")}
    xlm = transformers.XLMConfig(**sizes, **{"emb_dim": 32, "n_layers": 2, "n_heads": 4, "pad_index": 3})
    config = on_tokens(transformers.XLMWithLMHeadModel(xlm), tmp_path, "model.auto_class=masked_lm")
    with pytest.raises(ConfigError, match=r"cannot be checked without the values of its weights \(Runtime"):
        preflight(config)
