"""Lists of token ids that were padded before they came here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.data.reader import ReaderSpec
from tests.data.test_refused_text import WAYS, refusal, rows_of, write
from tests.data.test_tokens import tokens

from spd_hydra.data.packing import is_held_out

PAD = 3
IDS = [[65 + number % 26, 66 + number // 26, 40 + number] for number in range(40)]
TRAINED_ON = sorted(ids for ids in IDS if not is_held_out(np.array(ids), 0.3))


def padded(ids: list[int], side: str) -> dict[str, Any]:
    """As a tokenizer fills a text up to five tokens."""
    tokens, ones = ([PAD, PAD], [0, 0]), (ids, [1, 1, 1])
    first, second = (tokens, ones) if side == "left" else (ones, tokens)
    return {"input_ids": first[0] + second[0], "attention_mask": first[1] + second[1]}


@WAYS
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("values", [[0, 1], [False, True]], ids=["numbers", "truths"])
def test_what_the_mask_of_the_data_calls_padding_is_no_text(
    values: list[Any], side: str, streaming: bool, tmp_path: Path
) -> None:
    rows = [padded(ids, side) for ids in IDS]
    rows = [row | {"attention_mask": [values[one] for one in row["attention_mask"]]} for row in rows]
    path = write(tmp_path / "a.jsonl", [*rows, {"input_ids": [], "attention_mask": []}])
    source = tokens(path, tmp_path, pack=False, streaming=streaming, length=5)
    assert rows_of(source, ReaderSpec(), len(TRAINED_ON)) == TRAINED_ON


def test_held_out_data_are_padded_or_not_as_they_are_themselves(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.jsonl", [{"input_ids": ids} for ids in IDS[:20]])
    filled = write(tmp_path / "filled.jsonl", [padded(ids, "right") for ids in IDS[20:]])
    for name, eval_name, wanted in ((plain, filled, IDS[20:]), (filled, plain, IDS[:20])):
        source = tokens(name, tmp_path, eval_name=str(eval_name), pack=False, length=5)
        rows = source.bind_eval(ReaderSpec())._open_store().rows("eval").tolist()  # type: ignore[attr-defined]
        assert rows == [[*ids, -1, -1] for ids in wanted]


@WAYS
@pytest.mark.parametrize("mask", [[1, 1, 1], [1, 2, 1, 1, 1], [1, None, 1, 1, 1], None, 1, [[1]] * 5])
def test_a_mask_that_does_not_fit_its_list_is_refused(mask: Any, streaming: bool, tmp_path: Path) -> None:
    rows = [{"input_ids": [*ids, PAD, PAD], "attention_mask": mask} for ids in IDS]
    source = tokens(write(tmp_path / "a.jsonl", rows), tmp_path, streaming=streaming, pack=False)
    where = "a row" if streaming else "row 0 (counted from 0)"
    assert refusal(source, ReaderSpec()) == (
        "data.token_column: got input_ids, beside which attention_mask has to say of every token id whether "
        f"it is text (1) or padding (0); in {where} it does not (number of ids: 5); leave that column out of "
        "the data, or name another column of token ids"
    )


@WAYS
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("wrong", [-1, -100])
def test_negative_ids_are_named_as_padding_or_labels_to_be_ignored(
    wrong: int, pack: bool, streaming: bool, tmp_path: Path
) -> None:
    rows = [{"labels": [*ids, wrong] if number == 27 else ids} for number, ids in enumerate(IDS)]
    how: dict[str, Any] = {"token_column": "labels", "length": 3}
    source = tokens(write(tmp_path / "a.jsonl", rows), tmp_path, pack=pack, streaming=streaming, **how)
    where = "a row" if streaming else "row 27 (counted from 0)"
    assert refusal(source, ReaderSpec()) == (
        f"data.token_column: got labels, which holds the id {wrong} in {where}: negative ids are padding or "
        "labels to be ignored, and no tokens; leave them out of the lists, or give the data a column "
        "attention_mask with 0 in their places, or name another column"
    )


@WAYS
def test_negative_ids_where_the_mask_is_0_are_padding(streaming: bool, tmp_path: Path) -> None:
    rows = [{"ids": [*ids, -100], "attention_mask": [1, 1, 1, 0]} for ids in IDS]
    how: dict[str, Any] = {"token_column": "ids", "pack": False}
    source = tokens(write(tmp_path / "a.jsonl", rows), tmp_path, streaming=streaming, **how)
    assert rows_of(source, ReaderSpec(), len(TRAINED_ON)) == TRAINED_ON
