"""What a model may be given, and what is said of what it may not."""

import re
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.language import hand_made
from tests.model.tiny_hf import LENGTH, VOCAB, padded_tokens, saved_model, tokens

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import SiteMask
from spd_hydra.model.tms import TMSModel
from spd_hydra.model.tokens_in import adapt

SITE = "transformer.h.0.mlp.c_fc"


def gpt2(directory: Path) -> DecomposedModel:
    target = adapt(saved_model("gpt2", directory), "logits")
    return decomposed(target, SITE)


def decomposed(target: Any, site: str) -> DecomposedModel:
    config = Decomposition(sites={"a": SitePattern(pattern=site, C=5)})
    return DecomposedModel(target, config, MLPCausalImportance(hidden=2), seed=0).eval()


@torch.no_grad()
def test_what_a_tokenizer_returns_counts_as_the_tokens_with_their_padding(tmp_path: Path) -> None:
    model, padded = gpt2(tmp_path), padded_tokens()[:2]  # GPT-2 counts padding in front as positions
    valid = padded >= 0
    given: Any = UserDict({"input_ids": padded.clamp(min=0), "attention_mask": valid.long()})
    g, of_given = (model.causal_importances(batch)[SITE].lower for batch in (padded, given))
    assert torch.equal(of_given, g)
    assert torch.equal(model(given)[valid], model(padded)[valid])
    assert torch.equal(model({"input_ids": tokens()}), model(tokens()))


@torch.no_grad()
def test_padding_in_front_is_refused_where_the_target_counts_it_as_positions(tmp_path: Path) -> None:
    late = padded_tokens()[1:]  # the second of which begins late
    given = {"input_ids": late.clamp(min=0), "attention_mask": (late >= 0).long()}
    with pytest.raises(ValueError, match="row 1 begins with padding") as caught:
        gpt2(tmp_path / "gpt2").causal_importances(given)
    assert str(caught.value) == (
        "batch: row 1 begins with padding, which the target counts as positions: its outputs are others than "
        'without; tokenise with padding_side="right"'
    )
    llama = decomposed(
        adapt(saved_model("llama", tmp_path / "llama"), "logits"), "model.layers.0.mlp.up_proj"
    )
    first = int((late[1] >= 0).int().argmax())
    g = llama.causal_importances(given)["model.layers.0.mlp.up_proj"].lower
    alone = llama.causal_importances(late[1:, first:])["model.layers.0.mlp.up_proj"].lower
    torch.testing.assert_close(g[1, first:], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (
            tokens()[0],
            ValueError,
            f"batch: got shape [{LENGTH}], int64, must be token ids, [batch, length]; for one text give "
            "tokens[None]",
        ),
        (
            torch.zeros(1, 33, dtype=torch.long),
            ValueError,
            "batch: got rows of 33 tokens, but the target takes at most 32; give fewer, or cut the text into "
            "rows",
        ),
        (
            torch.zeros(1, 3),
            ValueError,
            "batch: got shape [1, 3], float32, must be token ids, [batch, length]",
        ),
        (
            torch.full((1, 3), VOCAB),
            ValueError,
            f"batch: got token id {VOCAB}, but the target takes ids below {VOCAB}; use its tokenizer",
        ),
        ([1, 2], TypeError, "batch: got a list, must be a tensor with one row per input"),
        (
            {"input_ids": [1, 2]},
            TypeError,
            "batch: got a mapping of input_ids: list; its input_ids must be a tensor, as "
            'tokenizer(texts, return_tensors="pt", padding=True) gives them',
        ),
    ],
)
def test_what_a_language_model_does_not_take_is_said(
    tmp_path: Path, batch: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        gpt2(tmp_path).causal_importances(batch)
    assert str(caught.value) == message


def test_inputs_of_another_width_are_told_with_their_shape() -> None:
    model = decomposed(TMSModel(torch.randn(2, 5), torch.zeros(5), 0), "embed")
    with pytest.raises(
        ValueError, match=r"batch: got shape \[3, 7\], float32, which the target does not take: "
    ):
        model.causal_importances(torch.zeros(3, 7))


def test_one_input_without_an_axis_of_rows_is_told_how_to_give_it() -> None:
    model = decomposed(TMSModel(torch.randn(2, 5), torch.zeros(5), 0), "embed")
    told = "got shape [5], which has no axis of rows, must be [batch, …]; for a single input x give x[None]"
    with pytest.raises(ValueError, match=re.escape(f"batch: {told}")):
        model.causal_importances(torch.zeros(5))
    assert model.causal_importances(torch.zeros(5)[None])["embed"].lower.shape[0] == 1


def test_a_mask_of_another_number_of_subcomponents_is_told_with_c(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="one number for each of the C = 5 subcomponents of the site"
    ) as caught:
        gpt2(tmp_path)(tokens(), {SITE: SiteMask(mask=torch.ones(4))})
    assert str(caught.value).startswith(f"masks['{SITE}']: got a mask of shape [4], must be [..., 5]")


def test_subcomponents_show_their_sizes(tmp_path: Path) -> None:
    assert repr(gpt2(tmp_path).pieces(SITE)) == "Subcomponents(C=5, d_in=32, d_out=128)"


@torch.no_grad()
def test_called_as_transformers_calls_it_a_target_answers_as_its_own_class(tmp_path: Path) -> None:
    own: Any = saved_model("gpt2", tmp_path)
    adapted: Any = adapt(saved_model("gpt2", tmp_path), "logits")
    expected = own.generate(tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    found = adapted.generate(tokens(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(found, expected)
    torch.testing.assert_close(adapted(input_ids=tokens()).logits, adapted(tokens()))


@torch.no_grad()
def test_rows_of_one_token_are_no_positions_in_a_row_for_an_embedding() -> None:
    model = hand_made()  # of 3 tokens; its embedding is the identity, and decomposed
    tokens = torch.tensor([[2], [0], [1]])
    g = model.causal_importances(tokens)
    assert {site: own.lower.shape for site, own in g.items()} == {"embed": (3, 1, 3), "unembed": (3, 1, 3)}
    only_second = SiteMask(mask=torch.tensor([0.0, 1.0, 0.0]).expand(3, 1, 3), delta=torch.ones(3, 1))
    masked = model(tokens, {"embed": only_second})
    # Without the rows of tokens 2 and 0 the first two positions are zero, and their logits too.
    assert torch.equal(masked[:2], torch.zeros(2, 1, 3))
    torch.testing.assert_close(masked[2], model(tokens)[2])
