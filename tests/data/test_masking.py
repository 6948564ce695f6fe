"""Mask tokens: drawn by place alone, never of padding or special tokens, with their answers beside them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.data.reader import ReaderSpec

from spd_hydra import rng
from spd_hydra.data.base import Batches
from spd_hydra.data.masking import MaskedBatches
from spd_hydra.data.tokens import Tokens
from spd_hydra.section import ConfigError

MASK, SPECIAL, LENGTH = 99, 7, 40
KEY = rng.key(0, "train/data")


class Places(Batches):
    """Row i holds i, i + 1, … modulo 50, and two positions of padding."""

    ordered, padded = True, True

    def __call__(self, key: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        tokens = (rows[:, None].long() + torch.arange(LENGTH)) % 50
        tokens[:, -2:] = -1
        return tokens

    def content(self) -> str:
        return "places"


def masked(fraction: float = 0.3) -> MaskedBatches:
    return MaskedBatches(Places(), fraction=fraction, mask=MASK, special=[SPECIAL, 0])


def test_a_batch_and_its_answers_are_the_text_and_their_share_is_as_asked() -> None:
    rows = torch.arange(500)
    seen, answers, text = masked()(KEY, rows), masked().answers(KEY, rows), Places()(KEY, rows)
    hidden = seen == MASK
    assert torch.equal(torch.where(hidden, answers, seen), text)
    assert (answers[~hidden] < 0).all()
    assert hidden.sum().item() / (text > 0).sum().item() == pytest.approx(0.3, abs=0.02)
    assert not hidden[(text < 0) | (text == SPECIAL) | (text == 0)].any()


def test_a_slice_of_places_is_the_slice_of_the_whole() -> None:
    whole = masked()(KEY, torch.arange(60))
    assert torch.equal(masked()(KEY, torch.arange(17, 41)), whole[17:41])
    assert torch.equal(masked()(KEY, torch.tensor([59, 3])), whole[[59, 3]])


def test_other_keys_and_other_places_mask_other_positions() -> None:
    rows = torch.zeros(1, dtype=torch.int64)
    drawn = [
        masked()(key, rows + place) == MASK for key in (KEY, rng.key(0, "eval/data")) for place in (0, 50)
    ]
    assert len({tuple(one[0].tolist()) for one in drawn}) == 4


def test_content_depends_on_the_share() -> None:
    assert len({Places().content(), masked(0.1).content(), masked(0.2).content()}) == 3


class FillsMasks(ReaderSpec):
    """A target that fills mask tokens."""

    def fills_masks(self) -> bool:
        return True


def with_mask_token(directory: Path, source: Any) -> str:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.tokenizer)
    tokenizer.mask_token = "~"
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize(
    ("of_masks", "given", "share"), [(True, None, 0.15), (True, 0.0, 0), (False, None, 0), (False, 0.5, 0.5)]
)
def test_texts_of_masked_language_models_are_masked_unless_told(
    of_masks: bool, given: float | None, share: float, spec: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(f"paragraph {number} of a text" for number in range(200)))
    target = (FillsMasks if of_masks else ReaderSpec)(tokenizer=with_mask_token(tmp_path / "t", spec))
    source = Tokens(
        name=str(tmp_path / "a.txt"),
        cache_dir=str(tmp_path / "c"),
        length=16,
        mask_fraction=given,
        eval_fraction=0.3,
    )
    seen = source.bind(target)(KEY, torch.arange(200))
    assert (seen == ord("~")).float().mean().item() == pytest.approx(share, abs=0.04)


def test_a_share_without_a_mask_token_is_refused(spec: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text\n\n" * 9)
    source = Tokens(name=str(tmp_path / "a.txt"), cache_dir=str(tmp_path), length=16, mask_fraction=0.2)
    with pytest.raises(
        ConfigError,
        match=r"data.mask_fraction: got 0.2, which needs a mask token, but the tokenizer has none",
    ):
        source.bind(spec)
