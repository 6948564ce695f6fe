"""A model's own Python code is run from a saved run only where the user said so."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tests.cli.conftest import Call, spd_run  # noqa: F401 (a fixture)
from tests.hub_cache import COMMIT, cached_model
from tests.model.tiny_hf import saved_model, tokens

from spd_hydra import decompose, load_run, rng
from spd_hydra.composition import compose
from spd_hydra.data.tokenizing import Reader, make_reader
from spd_hydra.exit_code import ExitCode
from spd_hydra.model.hf import HuggingFace
from spd_hydra.section import ConfigError

NAME = "owner/model"
CODE = """
import os
from transformers import GPT2Config, GPT2LMHeadModel

class OwnConfig(GPT2Config):
    model_type = "own_of_a_test"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with open(os.environ["WHERE_CODE_TELLS"], "a") as file:
            file.write("ran")

class Own(GPT2LMHeadModel):
    config_class = OwnConfig
"""
ASKED = (
    "trust_remote_code: the target of {path} comes with Python code, which is not run unasked: that of "
    f"owner/model at commit {COMMIT}; if you have read it and trust it, "
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where a cache has a model that comes with Python code, and where `told` appears when that has run."""
    folder = tmp_path_factory.mktemp("remote_code")
    files = folder / "files"
    saved_model("gpt2", files)
    config = json.loads((files / "config.json").read_text())
    config["model_type"] = "own_of_a_test"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (files / "config.json").write_text(json.dumps(config))
    (files / "own.py").write_text(CODE)
    cached_model(folder / "hub", NAME, files)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder / "modules"))
        patch.syspath_prepend(str(folder / "modules"))
        patch.setenv("WHERE_CODE_TELLS", str(folder / "told"))
        yield folder


@pytest.fixture(scope="module")
def finished(folder: Path) -> Path:
    """A run of two steps on that model."""
    text = folder / "ids.jsonl"
    text.write_text("\n".join(json.dumps({"ids": row}) for row in tokens(rows=40).tolist()))
    words = [
        *("experiment=lm_hf", "name=own", "device=cpu", f"out_dir={folder / 'runs'}"),
        *(f"model.name={NAME}", "model.trust_remote_code=true", f"model.revision={COMMIT}"),
        *(f"data.name={text}", "data.token_column=ids", "data.length=12", f"data.cache_dir={folder}"),
        *("data.eval_fraction=0.5", "decomposition.sites.mlp.pattern=transformer.h.0.mlp.*"),
        *("decomposition.C=3", "ci_fn.hidden=[4]", "loss=paper/tms_5-2"),
        *("train.steps=2", "train.batch_size=4", "train.compile=false", "train.checkpoint_every=1"),
        *("train.restarts.number=1", "train.faithfulness_warmup.steps=1", "eval.batches=1"),
        *("eval.batch_size=4", "eval.pgd_steps=[]", "eval.ablations=false", "eval.subcomponents=0"),
    ]
    return decompose(words).path


@pytest.fixture
def done(finished: Path, told: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(finished, tmp_path / "done"))


@pytest.fixture
def told(folder: Path) -> Path:
    """The file that exists as soon as the model's own code has run again."""
    (folder / "told").unlink(missing_ok=True)
    return folder / "told"


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("from_hub", [True, False])
def test_a_model_with_code_of_its_own_is_refused_with_the_keys_that_allow_it(
    from_hub: bool, is_known: bool, folder: Path, told: Path, tmp_path: Path
) -> None:
    files = shutil.copytree(folder / "files", tmp_path / "model")
    if is_known:  # a configuration that transformers has, of which it has no causal language model
        config = json.loads((files / "config.json").read_text())
        del config["auto_map"]["AutoConfig"]
        (files / "config.json").write_text(json.dumps(config | {"model_type": "vit"}))
    name = f"owner/with_code_{is_known}" if from_hub else str(files)
    if from_hub:
        cached_model(folder / "hub", name, files)
    with pytest.raises(ConfigError) as caught:
        HuggingFace(name=name).skeleton()
    commit = " and model.revision=<full commit hash>, the one that you have read" if from_hub else ""
    assert str(caught.value) == (
        f"model.trust_remote_code: got false, but {name} comes with Python code of its own, which is not run "
        f"unasked; if you have read it and trust it, set model.trust_remote_code=true{commit}"
    )
    assert not told.exists()


@pytest.mark.slow
def test_a_run_that_was_opened_runs_code_only_on_request(done: Path, told: Path) -> None:
    found = load_run(done)
    assert found.summary["steps"] == 2
    with pytest.raises(ConfigError) as caught:
        _ = found.model
    assert str(caught.value) == ASKED.format(path=done) + "call load_run(..., trust_remote_code=True)"
    assert not told.exists()
    model = load_run(done, trust_remote_code=True).model
    assert told.exists()
    weights = load_file(done / "checkpoints" / "step_2" / "model.safetensors")
    assert all(torch.equal(model.trainable_state()[name], value) for name, value in weights.items())


@pytest.mark.slow
def test_the_command_line_runs_the_code_of_a_saved_run_only_on_request(
    done: Path,
    told: Path,
    spd_run: Call,  # noqa: F811
) -> None:
    for words in (
        [f"resume={done}", "train.steps=3"],
        ["task=analyse", f"run={done}"],
        ["-m", "task=analyse", f"run={done}"],
    ):
        refused = spd_run(*words)
        assert refused.code == ExitCode.bad_config
        assert ASKED.format(path=done) + "add trust_remote_code=true" in refused.out + refused.err
        assert not told.exists()
        assert spd_run(*words, "trust_remote_code=true").code == ExitCode.ok
        told.unlink()
    assert load_run(done).summary["steps"] == 3
    assert not told.exists()


@pytest.mark.slow
def test_no_file_of_a_run_can_allow_code(done: Path, told: Path) -> None:
    path = done / "config.yaml"
    data = yaml.safe_load(path.read_text())
    assert "trust_remote_code" not in data
    path.write_text(yaml.safe_dump(data | {"trust_remote_code": True}))
    with pytest.raises(ConfigError, match=r"^trust_remote_code: a saved configuration has none"):
        load_run(done)
    assert not told.exists()


def test_a_new_run_is_told_where_to_say_yes() -> None:
    with pytest.raises(
        ConfigError, match=r"^trust_remote_code: got true, .* it is model\.trust_remote_code$"
    ):
        compose(["trust_remote_code=true"])


def test_a_model_without_code_of_its_own_needs_no_yes() -> None:
    assert compose(["experiment=tms_5-2"]).model.foreign_code() is None
    assert HuggingFace(name=NAME).foreign_code() is None


def test_code_of_another_repository_has_no_commit_and_is_refused(folder: Path, told: Path) -> None:
    snapshot = cached_model(folder / "hub", "owner/elsewhere", folder / "files")
    path = snapshot / "config.json"
    path.write_text(path.read_text().replace('"own.', '"other/repo--own.'))
    spec = HuggingFace(name="owner/elsewhere", revision=COMMIT, trust_remote_code=True)
    with pytest.raises(ConfigError, match=r"code of owner/elsewhere lies in other/repo, at no fixed commit"):
        spec.skeleton()
    assert not told.exists()


def test_code_in_a_directory_runs_where_it_is_trusted_and_needs_no_commit(folder: Path, told: Path) -> None:
    spec = HuggingFace(name=str(folder / "files"), trust_remote_code=True)
    assert not told.exists()
    module = spec.build(rng.generator(0, "unused"))
    assert told.exists()
    assert type(module).__name__ == "Own"
    assert spec.foreign_code() == f"{folder / 'files'}, a directory, as it is now"
    gone = HuggingFace(name=str(folder / "gone"), trust_remote_code=True)  # as a saved run would say later
    with pytest.raises(ConfigError, match=r"^model\.name: got .*gone, which is no directory and no id"):
        gone.skeleton()


def test_a_commit_of_a_directory_is_to_be_left_out_which_is_enough(folder: Path, told: Path) -> None:
    with pytest.raises(ConfigError, match=r"^model\.revision: .* which has no revisions; leave it out$"):
        HuggingFace(name=str(folder / "files"), revision=COMMIT, trust_remote_code=True).skeleton()
    assert not told.exists()
    HuggingFace(name=str(folder / "files"), trust_remote_code=True).skeleton()


TOKENIZER = """
import os
from transformers import PreTrainedTokenizer

class OwnTokenizer(PreTrainedTokenizer):
    with open(os.environ["WHERE_CODE_TELLS"], "a") as file:
        file.write("ran")

    vocab_size = 26

    def get_vocab(self):
        return {chr(97 + n): n for n in range(26)}

    def _tokenize(self, text, **options):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) - 97

    def _convert_id_to_token(self, index):
        return chr(97 + index)

    def save_vocabulary(self, directory, prefix=None):
        return ()
"""


def tokenizer_in(snapshot: Path, place: str = "own_tokenizer.OwnTokenizer") -> None:
    (snapshot / "own_tokenizer.py").write_text(TOKENIZER)
    told = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [place, None]}}
    (snapshot / "tokenizer_config.json").write_text(json.dumps(told))


def reader(spec: HuggingFace) -> Reader:
    """As the data make it for a target."""
    return make_reader(
        {"text": True},
        text_column=None,
        token_column=None,
        tokenizer=spec.tokenizer_name(),
        tokenizer_revision=spec.tokenizer_revision(),
        trusts_code=spec.trusts_tokenizer_code(),
        special_tokens=False,
        processes=1,
    )


@pytest.mark.parametrize("name", [None, "owner/with_tokenizer"])
def test_the_code_of_a_tokenizer_runs_where_that_of_its_model_does(
    folder: Path, told: Path, tmp_path: Path, name: str | None
) -> None:
    where = tmp_path / "model" if name is None else cached_model(folder / "hub", name, folder / "files")
    if name is None:
        shutil.copytree(folder / "files", where)
    tokenizer_in(where)
    name, revision = (str(where), None) if name is None else (name, COMMIT)
    with pytest.raises(ConfigError, match=r"^data\.tokenizer: got .* cannot be loaded"):
        reader(HuggingFace(name=name)).tokenizer()
    assert not told.exists()
    trusted = reader(HuggingFace(name=name, revision=revision, trust_remote_code=True)).tokenizer()
    assert told.exists()
    assert trusted("cab", add_special_tokens=False)["input_ids"] == [2, 0, 1]


def test_the_code_of_a_tokenizer_is_refused_from_another_repository(
    folder: Path, told: Path, tmp_path: Path
) -> None:
    shutil.copytree(folder / "files", tmp_path / "model")
    tokenizer_in(tmp_path / "model", "other/repo--own_tokenizer.OwnTokenizer")
    with pytest.raises(ConfigError, match=r"^model\.trust_remote_code: .* lies in other/repo, at no fixed"):
        reader(HuggingFace(name=str(tmp_path / "model"), trust_remote_code=True)).tokenizer()
    assert not told.exists()


def test_without_trust_the_code_is_refused_when_a_model_is_built(folder: Path, told: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("model.trust_remote_code: got false, but owner/model")):
        HuggingFace(name=NAME).skeleton()
    assert not told.exists()


def test_a_configuration_of_parts_cannot_name_a_kernel_to_download() -> None:
    told = json.dumps({"model_type": "gemma3", "attn_implementation": {"text_config": "owner/kernel"}})
    small = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 16}
    small |= {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8}
    vision = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    text = json.dumps(json.loads(told) | {"text_config": small, "vision_config": vision})
    module = HuggingFace(name="anything").skeleton(text)
    named = [part.config._attn_implementation for part in module.modules() if hasattr(part, "config")]
    assert named
    assert all("/" not in (name or "") for name in named)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_configuration_cannot_name_a_kernel_to_download(tmp_path: Path, key: str) -> None:
    saved_model("gpt2", tmp_path)
    path = tmp_path / "config.json"
    data = json.loads(path.read_text()) | {key: "owner/kernel"}
    path.write_text(json.dumps(data))
    spec = HuggingFace(name=str(tmp_path))
    for module in (spec.skeleton(), spec.skeleton(json.dumps(data))):
        assert "/" not in module.config._attn_implementation
