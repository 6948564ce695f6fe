"""Targets from Hugging Face: the same numbers as transformers gives, and what each mistake is told."""

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.model.tiny_hf import MODELS, VOCAB, padded_tokens, saved_model, tokens
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from spd_hydra import rng
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.composition import compose
from spd_hydra.data.tokens import require_length
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import SiteMask
from spd_hydra.model.hf import AutoClass, HuggingFace, KeepWeights
from spd_hydra.model.tokens_in import TokensIn
from spd_hydra.saved_config import to_yaml
from spd_hydra.section import ConfigError

GENERATOR = rng.generator(0, "unused")
BLOCKS = "*.[0-9]*.*"


@pytest.fixture(params=MODELS, scope="module")
def tiny(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[HuggingFace, nn.Module]:
    """The configuration of a tiny model in a directory, and the model as transformers made it."""
    directory = tmp_path_factory.mktemp(request.param)
    original = saved_model(request.param, directory)
    return HuggingFace(name=str(directory), auto_class=AutoClass[MODELS[request.param][0]]), original


@pytest.fixture
def gpt2(tmp_path: Path) -> tuple[HuggingFace, nn.Module]:
    original = saved_model("gpt2", tmp_path)
    return HuggingFace(name=str(tmp_path)), original


def called(original: nn.Module, batch: torch.Tensor) -> Any:
    """What a user of transformers would write."""
    pad = original.config.pad_token_id or 0
    with torch.no_grad():
        return original(
            input_ids=batch.where(batch >= 0, torch.tensor(pad)), attention_mask=(batch >= 0).long()
        )


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_the_output_is_that_of_the_model_and_module_paths_are_its_own(
    tiny: tuple[HuggingFace, nn.Module],
) -> None:
    spec, original = tiny
    module = spec.build(GENERATOR)
    close(module(tokens()), called(original, tokens()).logits)
    assert [name for name, _ in module.named_modules()] == [name for name, _ in original.named_modules()]
    assert isinstance(module, type(original))
    assert not module.training
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}


def test_padding_is_attended_to_by_no_position(tiny: tuple[HuggingFace, nn.Module]) -> None:
    spec, original = tiny
    batch = padded_tokens()
    found, wanted = spec.build(GENERATOR)(batch), called(original, batch).logits
    counted = batch >= 0 if found.ndim == 3 else slice(None)
    close(found[counted], wanted[counted])


def test_without_padding_no_attention_mask_is_needed(tiny: tuple[HuggingFace, nn.Module]) -> None:
    spec, original = tiny
    module = spec.build(GENERATOR)
    module.expect_padding(False)
    close(module(tokens()), called(original, tokens()).logits)


def test_all_masks_and_deltas_at_one_give_the_models_own_output(
    tiny: tuple[HuggingFace, nn.Module],
) -> None:
    spec, original = tiny
    model = decomposed(spec.build(GENERATOR), BLOCKS)
    assert len(model.site_names) >= 8
    batch = padded_tokens()
    ones = torch.ones(*batch.shape)
    masks = {site: SiteMask(mask=ones[..., None].expand(-1, -1, 5), delta=ones) for site in model.site_names}
    found, wanted = model(batch, masks), called(original, batch).logits
    counted = batch >= 0 if found.ndim == 3 else slice(None)
    close(found[counted], wanted[counted])


def test_subcomponents_that_sum_to_the_matrices_give_the_models_own_output_without_delta(
    tiny: tuple[HuggingFace, nn.Module],
) -> None:
    spec, original = tiny
    module = spec.build(GENERATOR)
    names = {id(layer): name for name, layer in module.named_modules()}
    assert isinstance(module, transformers.PreTrainedModel)
    embedding = module.get_input_embeddings()
    sites = {"blocks": SitePattern(pattern=BLOCKS, C=VOCAB + 100)}
    if type(embedding) is nn.Embedding:
        sites["embedding"] = SitePattern(pattern=names[id(embedding)], C=VOCAB + 100)
    ci_fn = SharedMLPCausalImportance(hidden=[4])
    model = DecomposedModel(module, Decomposition(sites=sites), ci_fn, seed=0)
    assert len(model.site_names) >= 8
    with torch.no_grad():
        for site in model.site_names:  # V reads each input by itself, U writes what W makes of it
            pieces, W = model.pieces(site), model.weight(site)
            pieces.V.copy_(torch.eye(*pieces.V.shape))
            pieces.U.zero_()[: W.shape[1]] = W.T
    batch = padded_tokens()
    ones = torch.ones(*batch.shape, VOCAB + 100)
    found = model(batch, {site: SiteMask(mask=ones) for site in model.site_names})
    counted = batch >= 0 if found.ndim == 3 else slice(None)
    close(found[counted], called(original, batch).logits[counted])


def decomposed(module: nn.Module, pattern: str) -> DecomposedModel:
    sites = {"every": SitePattern(pattern=pattern, C=5)}
    return DecomposedModel(module, Decomposition(sites=sites), SharedMLPCausalImportance(hidden=[4]), seed=0)


def test_copies_share_what_they_should_and_compute_the_same(gpt2: tuple[HuggingFace, nn.Module]) -> None:
    module = gpt2[0].build(GENERATOR)
    shared = {id(tensor): tensor for tensor in [*module.parameters(), *module.buffers()]}
    again = copy.deepcopy(module, shared)
    assert again is not module
    assert again.lm_head.weight is module.lm_head.weight
    assert torch.equal(again(tokens()), module(tokens()))


@pytest.mark.parametrize("padded", [True, False])
def test_a_traced_model_reads_nothing_of_the_batch_it_was_traced_with(
    tiny: tuple[HuggingFace, nn.Module], padded: bool
) -> None:
    module = tiny[0].build(GENERATOR)
    module.expect_padding(padded)
    graph = make_fx(lambda batch: module(batch))(tokens())
    other = padded_tokens() if padded else tokens(seed=1)
    close(graph(other), module(other))


def test_the_skeleton_has_the_shapes_of_the_model_and_needs_no_values(
    tiny: tuple[HuggingFace, nn.Module],
) -> None:
    spec, original = tiny
    with torch.device("meta"):
        module = spec.skeleton()
    assert all(parameter.is_meta for parameter in module.parameters())
    wanted = {name: parameter.shape for name, parameter in original.named_parameters()}
    assert {name: parameter.shape for name, parameter in module.named_parameters()} == wanted
    batch = tokens().to("meta")
    assert module(batch).shape == called(original, tokens()).logits.shape
    assert isinstance(module, TokensIn)


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])  # now, and in the configurations of older versions
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_model_is_in_float32_whatever_its_configuration_says(tmp_path: Path, name: str, key: str) -> None:
    original = saved_model(name, tmp_path)
    path = tmp_path / "config.json"
    told = {own: value for own, value in json.loads(path.read_text()).items() if own != "dtype"}
    path.write_text(json.dumps(told | {key: "bfloat16"}))
    spec = HuggingFace(name=str(tmp_path))
    module = spec.build(GENERATOR)
    with torch.device("meta"):
        without_values = spec.skeleton()
    for made in (module, without_values, spec.skeleton(), spec.skeleton(spec.architecture(module))):
        floats = [
            tensor.dtype for tensor in [*made.parameters(), *made.buffers()] if tensor.is_floating_point()
        ]
        assert set(floats) == {torch.float32}
    assert without_values(tokens().to("meta")).dtype == torch.float32
    close(module(tokens()), called(original, tokens()).logits)


def test_neither_building_nor_the_skeleton_draws_from_torchs_own_generator(
    gpt2: tuple[HuggingFace, nn.Module],
) -> None:
    before = torch.get_rng_state()
    first, again = gpt2[0].skeleton(), gpt2[0].skeleton()
    gpt2[0].build(GENERATOR)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)


def test_tied_embeddings_stay_one_parameter(gpt2: tuple[HuggingFace, nn.Module]) -> None:
    for module in (gpt2[0].build(GENERATOR), gpt2[0].skeleton()):
        assert module.lm_head.weight is module.transformer.wte.weight
        assert "lm_head.weight" not in dict(module.named_parameters())


@pytest.mark.parametrize(
    ("output", "place"),
    [("logits", lambda out: out.logits), ("0", lambda out: out[0]), (None, lambda out: out.logits)],
)
def test_the_output_is_chosen_by_its_path(
    gpt2: tuple[HuggingFace, nn.Module], output: str | None, place: Any
) -> None:
    spec = HuggingFace(name=gpt2[0].name, output=output)
    close(spec.build(GENERATOR)(tokens()), place(called(gpt2[1], tokens())))


def test_the_base_model_gives_its_last_hidden_state(gpt2: tuple[HuggingFace, nn.Module]) -> None:
    spec = HuggingFace(name=gpt2[0].name, auto_class=AutoClass.base)
    close(spec.build(GENERATOR)(tokens()), called(gpt2[1].transformer, tokens()).last_hidden_state)


@pytest.mark.parametrize("member", AutoClass)
def test_a_class_goes_by_its_name_in_transformers_too_and_is_saved_under_one(member: AutoClass) -> None:
    (name,) = (other for other, own in AutoClass.__members__.items() if own is member and other != own.name)
    assert issubclass(getattr(transformers, name), transformers.models.auto.auto_factory._BaseAutoModelClass)
    words = ["experiment=lm_hf", "model.name=any", "data.name=any"]
    config = compose([*words, f"model.auto_class={name}"])
    assert config == compose([*words, f"model.auto_class={member.value}"])
    assert f"auto_class: {member.value}\n" in to_yaml(config)


@pytest.mark.parametrize(
    ("auto_class", "output", "kind"),
    [
        (AutoClass.question_answering, "start_logits", transformers.BertForQuestionAnswering),
        (AutoClass.pre_training, "prediction_logits", transformers.BertForPreTraining),
        (AutoClass.token_classification, "logits", transformers.BertForTokenClassification),
    ],
)
def test_further_heads_are_those_of_transformers(
    tmp_path: Path, auto_class: AutoClass, output: str, kind: Any
) -> None:
    with torch.random.fork_rng(devices=[]):
        original = kind(MODELS["bert"][1]()).eval()
    original.save_pretrained(tmp_path)
    spec = HuggingFace(name=str(tmp_path), auto_class=auto_class, output=output)
    close(spec.build(GENERATOR)(tokens()), getattr(called(original, tokens()), output))


@pytest.mark.parametrize(
    ("auto_class", "output", "predicts"),
    [
        (AutoClass.causal_lm, None, True),
        (AutoClass.causal_lm, "hidden_states.1", False),
        (AutoClass.masked_lm, None, False),
        (AutoClass.base, None, False),
    ],
)
def test_logits_of_a_causal_model_are_of_the_next_token(
    auto_class: AutoClass, output: str | None, predicts: bool
) -> None:
    spec = HuggingFace(name="any", auto_class=auto_class, output=output)
    assert spec.predicts_next_token() is predicts


def test_sizes_and_tokenizer_are_known_from_the_configuration_alone(
    gpt2: tuple[HuggingFace, nn.Module],
) -> None:
    spec = gpt2[0]
    (Path(spec.name) / "model.safetensors").unlink()
    assert (spec.vocab_size(), spec.context_length(), spec.tokenizer_name()) == (50, 32, spec.name)
    assert spec.prefetch() == [f"model {spec.name}: a local directory, nothing to fetch"]


def test_the_longest_text_is_the_longest_that_the_model_takes(tiny: tuple[HuggingFace, nn.Module]) -> None:
    spec, original = tiny
    longest = spec.context_length()
    assert longest is not None
    called(original, torch.full((1, longest), 5))
    if (
        getattr(original.config, "rope_parameters", None) is None
    ):  # else it could take more than it was made for
        with pytest.raises((IndexError, RuntimeError)):
            called(original, torch.full((1, longest + 1), 5))


def test_rows_of_positions_beside_those_that_are_named_are_not_counted(tmp_path: Path) -> None:
    small: dict[str, Any] = {
        "hidden_size": 16,
        "word_embed_proj_dim": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
    }
    sizes = small | {"num_attention_heads": 2, "vocab_size": 50, "max_position_embeddings": 20}
    original = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes))
    assert original.model.decoder.embed_positions.weight.shape[0] == 22
    original.save_pretrained(tmp_path)
    assert HuggingFace(name=str(tmp_path)).context_length() == 20
    called(original, torch.full((1, 20), 5))
    with pytest.raises(IndexError):
        called(original, torch.full((1, 21), 5))


def test_rows_that_are_longer_than_the_positions_of_a_model_are_refused(tmp_path: Path) -> None:
    saved_model(
        "roberta", tmp_path
    )  # 32 rows of positions, of which those up to the padding's, 3, are not used
    spec = HuggingFace(name=str(tmp_path), auto_class=AutoClass.masked_lm)
    require_length(28, spec)
    with pytest.raises(
        ConfigError,
        match=r"^data\.length: got 29, but the target takes at most 28 tokens; set data\.length=28",
    ):
        require_length(29, spec)


@pytest.mark.parametrize(
    ("keep", "kept"), [(KeepWeights.auto, True), (KeepWeights.always, True), (KeepWeights.never, False)]
)
def test_small_weights_are_kept_unless_asked_not_to(
    gpt2: tuple[HuggingFace, nn.Module], keep: KeepWeights, kept: bool
) -> None:
    spec = HuggingFace(name=gpt2[0].name, keep_weights=keep)
    assert spec.keeps_weights(spec.build(GENERATOR)) is kept


def test_large_weights_are_not_copied_by_themselves(gpt2: tuple[HuggingFace, nn.Module]) -> None:
    with torch.device("meta"):
        large = nn.Linear(2**13, 2**13 + 1)  # 4 bytes each: a little more than 256 MiB
    assert not gpt2[0].keeps_weights(large)
    assert HuggingFace(name="any", keep_weights=KeepWeights.always).keeps_weights(large)


# ---- what mistakes are told


def refused(spec: HuggingFace) -> str:
    with pytest.raises(ConfigError) as caught:
        spec.build(GENERATOR)(tokens())
    return str(caught.value)


def test_an_output_that_there_is_not_is_named_with_those_there_are(
    gpt2: tuple[HuggingFace, nn.Module],
) -> None:
    assert refused(HuggingFace(name=gpt2[0].name, output="logit")) == (
        "model.output: got logit, under which the model gives no tensor; it has logits"
    )


def test_weights_without_the_head_of_the_class_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved_model("bert", tmp_path)
    with caplog.at_level(logging.ERROR):
        message = refused(HuggingFace(name=str(tmp_path), auto_class=AutoClass.sequence_classification))
    assert message == (
        f"model.auto_class: got sequence_classification, but the weights of {tmp_path} lack "
        "bert.pooler.dense.bias, bert.pooler.dense.weight, classifier.bias, … (4 in all); choose the class "
        "that it was trained as"
    )


def test_a_class_that_a_model_does_not_come_in_is_refused(gpt2: tuple[HuggingFace, nn.Module]) -> None:
    message = refused(HuggingFace(name=gpt2[0].name, auto_class=AutoClass.masked_lm))
    assert message.startswith(
        f"model: {gpt2[0].name} cannot be loaded as masked_lm: Unrecognized configuration"
    )
    assert "\n" not in message


def test_an_encoder_with_a_decoder_is_refused(tmp_path: Path) -> None:
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="takes two inputs, one for its encoder and one for its decoder"):
        HuggingFace(name=str(tmp_path)).skeleton()


def test_an_unknown_kind_of_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing_known"}')
    with pytest.raises(ConfigError, match=r"whose config\.json cannot be used: .*nothing_known"):
        HuggingFace(name=str(tmp_path)).skeleton()


@pytest.mark.parametrize("text", ["", "[1, 2]", "{"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"whose config\.json cannot be used"):
        HuggingFace(name=str(tmp_path)).skeleton()


@pytest.mark.parametrize(
    "value",
    [
        {"num_attention_heads": "4"},
        {"vocab_size": 64.0},
        {"layer_types": ["x"]},
        {"num_hidden_layers": None},
        {"pad_token_id": 64_000},
    ],
    ids=str,
)
def test_a_configuration_with_a_value_that_transformers_does_not_take_is_refused(
    tmp_path: Path, value: dict[str, Any]
) -> None:
    saved_model("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | value))
    with pytest.raises(ConfigError, match=r"^model"):
        HuggingFace(name=str(tmp_path)).skeleton()


def test_damaged_weights_are_refused(gpt2: tuple[HuggingFace, nn.Module]) -> None:
    file = Path(gpt2[0].name) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert refused(gpt2[0]).startswith(f"model: {gpt2[0].name} cannot be loaded as causal_lm: ")


@pytest.mark.parametrize("revision", [None, "main", "0123abc", "g" * 40])
def test_foreign_code_needs_a_full_commit(revision: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        HuggingFace(name="gpt2", trust_remote_code=True, revision=revision)
    assert str(caught.value) == (
        f"trust_remote_code: got true with revision {revision}; give the full commit hash (40 hexadecimal "
        "digits) whose code you have read"
    )
    assert HuggingFace(name="gpt2", trust_remote_code=True, revision="0a" * 20).trust_remote_code


def test_without_it_foreign_code_is_not_run(tmp_path: Path) -> None:
    code = "import pathlib\npathlib.Path('ran').touch()\n"
    (tmp_path / "configuration_x.py").write_text(code)
    (tmp_path / "config.json").write_text(
        '{"model_type": "x", "auto_map": {"AutoConfig": "configuration_x.XConfig"}}'
    )
    with pytest.raises(ConfigError, match=r"^model\.trust_remote_code: got false"):
        HuggingFace(name=str(tmp_path)).skeleton()
    assert not Path("ran").exists()


def test_a_model_for_masked_tokens_predicts_no_next_token(tmp_path: Path) -> None:
    saved_model("bert", tmp_path)
    with pytest.raises(ConfigError) as caught:
        HuggingFace(name=str(tmp_path)).skeleton()
    assert str(caught.value) == (
        f"model.auto_class: got causal_lm, but {tmp_path}, a bert, sees the tokens that it would have to "
        "predict; use model.auto_class=masked_lm or base"
    )


def test_the_stream_of_a_model_needs_no_pooler(tmp_path: Path) -> None:
    original = saved_model("bert", tmp_path)
    spec = HuggingFace(name=str(tmp_path), auto_class=AutoClass.base)
    module = spec.build(GENERATOR)
    wanted = original.bert(input_ids=tokens())
    close(module(tokens()), wanted.last_hidden_state)
    skeleton = spec.skeleton(spec.architecture(module))
    assert module.state_dict().keys() == skeleton.state_dict().keys()
    with pytest.raises(
        ConfigError, match=r"lack pooler\.dense\.bias, pooler\.dense\.weight; choose the class"
    ):
        HuggingFace(name=str(tmp_path), auto_class=AutoClass.base, output="pooler_output").build(GENERATOR)
