"""Configurations of transformers: what is read from them, what they survive, which are refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.model.tiny_hf import MODELS, padded_tokens, saved_model, tokens
from torch import nn

from spd_hydra import rng
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.composition import compose
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import SiteMask
from spd_hydra.loss.divergence import Divergence
from spd_hydra.model import hf_config
from spd_hydra.model.hf import AutoClass, HuggingFace
from spd_hydra.section import ConfigError

GENERATOR = rng.generator(0, "unused")


def saved(config: Any, directory: Path, **changed: Any) -> str:
    """A directory with a configuration alone, whose keys are changed; where it is."""
    config.save_pretrained(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return str(directory)


def made(original: Any, directory: Path) -> tuple[HuggingFace, nn.Module]:
    """A model of transformers, and what is built from a copy of it."""
    original.eval().save_pretrained(directory)
    spec = HuggingFace(name=str(directory))
    return spec, spec.build(GENERATOR)


@pytest.mark.parametrize("limit", [(0.0, math.inf), (-math.inf, 1.5)])
def test_a_model_with_infinity_in_its_configuration_is_made_again_from_its_architecture(
    tmp_path: Path, limit: tuple[float, float]
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
    config = transformers.Mamba2Config(**sizes, **heads, time_step_limit=limit)
    spec, module = made(transformers.Mamba2ForCausalLM(config), tmp_path)
    architecture = spec.architecture(module)
    assert "__float__" in architecture
    again = spec.skeleton(architecture)
    assert tuple(again.config.time_step_limit) == limit
    assert spec.architecture(again) == architecture


def test_what_json_can_say_is_restored_as_it_is() -> None:
    config = transformers.BertConfig(id2label={0: "a", 1: "b", 2: "__float__"}, hidden_dropout_prob=0.25)
    again = hf_config.restored(config.to_json_string())
    assert again.id2label == {0: "a", 1: "b", 2: "__float__"}
    assert again.hidden_dropout_prob == 0.25


@pytest.mark.parametrize(
    ("changed", "auto_class", "gives"),
    [
        ({"num_labels": 3}, "sequence_classification", True),
        ({"num_labels": 3, "problem_type": "single_label_classification"}, "sequence_classification", True),
        ({"num_labels": 1}, "sequence_classification", False),
        ({"num_labels": 3, "problem_type": "multi_label_classification"}, "sequence_classification", False),
        ({"num_labels": 3, "problem_type": "regression"}, "sequence_classification", False),
        ({"num_labels": 1}, "token_classification", False),
        ({"num_labels": 2}, "token_classification", True),
        ({"num_labels": 1}, "masked_lm", True),
    ],
)
def test_outputs_are_compared_by_kl_where_one_class_of_several_is_right_and_else_by_squared_error(
    tmp_path: Path, changed: dict[str, Any], auto_class: str, gives: bool
) -> None:
    name = saved(transformers.BertConfig(**changed), tmp_path)
    assert HuggingFace(name=name, auto_class=AutoClass[auto_class]).gives_logits() is gives
    words = ["experiment=lm_hf", f"model.name={name}", "data.name=any", f"model.auto_class={auto_class}"]
    assert compose(words).loss.divergence is (Divergence.kl if gives else Divergence.mse)
    assert compose([*words, "loss.divergence=kl"]).loss.divergence is Divergence.kl


@pytest.mark.parametrize(("kind", "gives"), [("Electra", False), ("Funnel", False), ("GPT2", True)])
def test_the_chance_that_a_token_was_replaced_is_no_logit_of_classes(
    tmp_path: Path, kind: str, gives: bool
) -> None:
    name = saved(getattr(transformers, f"{kind}Config")(), tmp_path)
    assert HuggingFace(name=name, auto_class=AutoClass.pre_training).gives_logits() is gives


@pytest.mark.parametrize("padding", [-1, 50])
def test_padding_that_is_no_token_stands_for_none(tmp_path: Path, padding: int) -> None:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, intermediate_size=48)
    original = transformers.LlamaForCausalLM(config)
    original.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": padding}))
    if padding >= 50:  # transformers makes no embedding of it
        with pytest.raises(ConfigError, match=r"^model: "):
            HuggingFace(name=str(tmp_path)).skeleton()
        return
    batch = padded_tokens()
    with torch.no_grad():
        wanted = original(input_ids=batch.clamp(min=0), attention_mask=(batch >= 0).long()).logits
        found = HuggingFace(name=str(tmp_path)).build(GENERATOR)(batch)
    torch.testing.assert_close(found[batch >= 0], wanted[batch >= 0], rtol=0, atol=1e-5)


def test_a_configuration_without_a_padding_token_or_a_longest_text_is_read_all_the_same(
    tmp_path: Path,
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4}
    original = transformers.CodeGenForCausalLM(transformers.CodeGenConfig(**sizes, n_positions=32))
    assert not hasattr(original.config, "pad_token_id")
    spec, module = made(original, tmp_path)
    assert spec.context_length() == 32
    batch = padded_tokens()
    with torch.no_grad():
        wanted = original(input_ids=batch.clamp(min=0), attention_mask=(batch >= 0).long()).logits
    torch.testing.assert_close(module(batch)[batch >= 0], wanted[batch >= 0], rtol=0, atol=1e-5)


def test_a_longest_text_of_minus_one_is_no_limit(tmp_path: Path) -> None:
    config = transformers.XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=4, d_inner=48)
    assert config.max_position_embeddings == -1
    assert HuggingFace(name=saved(config, tmp_path)).context_length() is None


def test_the_blocks_of_rwkv_are_not_rescaled_in_place(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "context_length": 32}
    config = transformers.RwkvConfig(**sizes, num_hidden_layers=4, rescale_every=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        original = transformers.RwkvForCausalLM(config)
    _, module = made(original, tmp_path)
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    sites = {"every": SitePattern(pattern="*.[0-9]*.*", C=5)}
    ci_fn = SharedMLPCausalImportance(hidden=[4])
    model = DecomposedModel(module, Decomposition(sites=sites), ci_fn, seed=0)
    with torch.no_grad():
        wanted = original.train()(input_ids=tokens()).logits  # as it was trained: in use it is rescaled
        torch.testing.assert_close(module(tokens()), wanted, rtol=0, atol=1e-5)
        ones = torch.ones(*tokens().shape)
        masks = {
            site: SiteMask(mask=ones[..., None].expand(-1, -1, 5), delta=ones) for site in model.site_names
        }
        torch.testing.assert_close(model(tokens(), masks), wanted, rtol=0, atol=1e-5)
    assert len(masks) == 4 * 7
    assert all(torch.equal(parameter, before[name]) for name, parameter in module.named_parameters())


# ---- what mistakes are told


@pytest.mark.parametrize("method", ["skeleton", "build", "vocab_size"])
def test_a_quantised_model_is_refused(tmp_path: Path, method: str) -> None:
    saved_model("llama", tmp_path)
    path = tmp_path / "config.json"
    told = {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}}
    path.write_text(json.dumps(json.loads(path.read_text()) | told))
    spec = HuggingFace(name=str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        getattr(spec, method)(*([GENERATOR] if method == "build" else []))
    assert str(caught.value) == (
        f"model.name: got {tmp_path}, which is quantised; give the checkpoint in full precision"
    )


def test_a_classifier_at_the_last_token_needs_a_padding_token(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 4, "num_labels": 3}
    name = saved(transformers.GPT2Config(**sizes), tmp_path)
    spec = HuggingFace(name=name, auto_class=AutoClass.sequence_classification)
    with pytest.raises(ConfigError) as caught:
        spec.skeleton()
    assert str(caught.value) == (
        f"model.auto_class: got sequence_classification, but {name} has no padding token, by which it knows "
        "where a text ends; give a local copy with pad_token_id in its config.json"
    )
    config = transformers.GPT2Config(**sizes, pad_token_id=3)
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    assert spec.skeleton()(padded_tokens()).shape == (3, 3)


def test_a_classifier_at_the_first_token_needs_none(tmp_path: Path) -> None:
    config = MODELS["bert"][1]()
    config.pad_token_id = None
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    module = HuggingFace(name=str(tmp_path), auto_class=AutoClass.sequence_classification).skeleton()
    assert module(padded_tokens()).shape == (3, 2)


def own_code(directory: Path, configuration: str, model: str) -> HuggingFace:
    """A model whose code lies beside it."""
    told = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    saved_model("llama", directory)
    changed = {"auto_map": told, "model_type": "own_llama"}
    name = saved(MODELS["llama"][1](), directory, **changed)
    (directory / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        f"class OwnConfig(LlamaConfig):\n    model_type = 'own_llama'\n{configuration}\n"
        f"class Own(LlamaForCausalLM):\n    config_class = OwnConfig\n{model}\n"
    )
    return HuggingFace(name=name, trust_remote_code=True)


def test_code_of_a_model_that_lacks_a_package_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    spec = own_code(tmp_path / "model", "    pass", "    pass")
    path = tmp_path / "model" / "own.py"
    path.write_text("import no_such_package\n" + path.read_text())
    with pytest.raises(ConfigError, match=r"^model\.name: got .*cannot be used: .*no_such_package"):
        spec.skeleton()


@pytest.mark.parametrize(
    ("configuration", "model", "message"),
    [
        (
            "    def __init__(self, **kwargs):\n        raise AttributeError('odd')",
            "    pass",
            r"^model\.name: got .*, whose config\.json cannot be used: odd$",
        ),
        (
            "    pass",
            "    def __init__(self, config):\n        raise ZeroDivisionError('odd')",
            r"^model: .* cannot be loaded as causal_lm: odd$",
        ),
    ],
    ids=["configuration", "model"],
)
def test_code_of_a_model_may_raise_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, configuration: str, model: str, message: str
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with pytest.raises(ConfigError, match=message):
        own_code(tmp_path / "model", configuration, model).skeleton()


def test_a_model_that_needs_a_package_that_is_not_here_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_model("gpt2", tmp_path)

    def lacking(*_: Any, **__: Any) -> None:
        raise ImportError(
            "\nGPT2LMHeadModel requires the detectron2 library but it was not found.\nInstall it"
        )

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lacking)
    with pytest.raises(ConfigError) as caught:
        HuggingFace(name=str(tmp_path)).build(GENERATOR)
    assert str(caught.value) == (
        f"model: {tmp_path} cannot be loaded as causal_lm: GPT2LMHeadModel requires the detectron2 library "
        "but it was not found."
    )
