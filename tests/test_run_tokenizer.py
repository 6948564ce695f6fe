"""The tokenizer of an opened run: it pads, and is else what the data were made with."""

from pathlib import Path

import torch
from tests.data.reader import save_byte_tokenizer
from tests.model.tiny_hf import saved_model
from transformers import AutoTokenizer

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.model.tokens_in import adapt
from spd_hydra.run_tokenizer import able_to_pad

TEXTS = ["\x01\x02\x03", "\x04\x05\x06\x07\x08"]


def test_a_tokenizer_without_a_padding_token_gets_one_and_the_one_given_stays(tmp_path: Path) -> None:
    given = AutoTokenizer.from_pretrained(save_byte_tokenizer(tmp_path / "with_end"))
    assert given.pad_token is None
    found = able_to_pad(given)
    padded = found(TEXTS, padding=True, return_tensors="pt")
    assert padded["input_ids"][0].tolist() == [1, 2, 3, 256, 256]
    assert padded["attention_mask"][0].tolist() == [1, 1, 1, 0, 0]
    assert given.pad_token is None
    given.eos_token = None  # as those that are trained on a text have none
    found = able_to_pad(given)
    padded = found(TEXTS, padding=True, return_tensors="pt")
    assert padded["input_ids"][0].tolist() == [1, 2, 3, 0, 0]
    assert found("\x00\x01")["input_ids"] == [0, 1]
    assert able_to_pad(found) is found
    assert able_to_pad(None) is None


def test_padding_with_any_token_changes_no_causal_importance(tmp_path: Path) -> None:
    given = AutoTokenizer.from_pretrained(save_byte_tokenizer(tmp_path / "tokenizer"))
    given.eos_token = None
    tokenizer = able_to_pad(given)
    target = adapt(saved_model("gpt2", tmp_path / "gpt2"), "logits")
    sites = {"a": SitePattern(pattern="transformer.h.*.mlp.c_fc", C=5)}
    model = DecomposedModel(target, Decomposition(sites=sites), MLPCausalImportance(hidden=2), seed=0)
    model.eval().requires_grad_(False)
    together = model.causal_importances(tokenizer(TEXTS, padding=True, return_tensors="pt"))
    for row, text in enumerate(TEXTS):
        for site, alone in model.causal_importances(tokenizer(text, return_tensors="pt")).items():
            own = together[site].z[row, : alone.z.shape[1]]
            torch.testing.assert_close(own, alone.z[0], rtol=1e-4, atol=1e-5)
