"""What a tokenizer puts around a text, in rows of packed texts, and heads that read a whole text."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.data.reader import END, ReaderSpec
from tests.data.test_refused_text import change_tokenizer
from tests.data.test_tokens import KEY, TEXTS, tokens, write_jsonl
from tests.model.tiny_hf import saved_model

from spd_hydra.composition import compose
from spd_hydra.data.packing import is_held_out
from spd_hydra.data.special_tokens import begin_of
from spd_hydra.pipeline import remarks
from spd_hydra.preflight import preflight
from spd_hydra.section import ConfigError

BEGIN, AND = 1, 2  # special tokens of tokenizers made here


def tokenizer_with(spec: ReaderSpec, directory: Path, before: list[int], behind: list[int]) -> str:
    """The tokenizer of bytes, which puts these ids before and behind a text by itself."""
    shutil.copytree(str(spec.tokenizer), directory)
    names = {token: "<end>" if token == END else chr(token) for token in (*before, *behind)}
    first, last = (
        [{"SpecialToken": {"id": names[token], "type_id": 0}} for token in ids] for ids in (before, behind)
    )
    one = [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last]
    pair = [*one, {"Sequence": {"id": "B", "type_id": 0}}]
    known = {name: {"id": name, "ids": [token], "tokens": [name]} for token, name in names.items()}
    template = {"type": "TemplateProcessing", "single": one, "pair": pair, "special_tokens": known}
    change_tokenizer(directory, post_processor=template)
    return str(directory)


def cached(batches: Any) -> np.ndarray:
    found: np.ndarray = batches._open_store().rows("eval")[:80]
    return found


@pytest.mark.parametrize("streaming", [False, True], ids=["cached", "streamed"])
@pytest.mark.parametrize(
    ("before", "behind", "in_front", "end"),
    [
        ([], [], [], [END]),
        ([BEGIN], [], [BEGIN], [END]),
        ([BEGIN, AND], [END], [BEGIN, AND], [END]),
        ([BEGIN], [AND], [BEGIN], [END]),  # what ends a text is its end, whatever else is put behind it
        ([END], [END], [END], []),  # which ends the text before it, too
    ],
    ids=["nothing", "begin", "two and an end", "another end", "begin is end"],
)
def test_packed_texts_begin_as_the_tokenizer_begins_them_and_nothing_is_doubled(
    before: list[int],
    behind: list[int],
    in_front: list[int],
    end: list[int],
    streaming: bool,
    spec: ReaderSpec,
    tmp_path: Path,
) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    name = tokenizer_with(spec, tmp_path / "tokenizer", before, behind)
    how: dict[str, Any] = {"tokenizer": name, "length": 4, "eval_fraction": 0.9, "streaming": streaming}
    batches = tokens(tmp_path / "a.jsonl", tmp_path, **how).bind_eval(spec)
    # Held-out rows of a stream come in the order of the text, as they are in a cache.
    rows = batches(KEY, torch.arange(80)).numpy() if streaming else cached(batches)
    letters = [[ord(letter) for letter in text] for text in TEXTS]
    documents = [one for one in letters if is_held_out(np.array(one), 0.9)]
    whole = [token for one in documents for token in (*in_front, *one, *end)]
    assert rows.shape == (80, 4)
    assert rows.reshape(-1).tolist() == whole[:320]


def test_a_token_in_front_of_documents_that_the_target_does_not_know_is_refused(
    spec: ReaderSpec, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    name = tokenizer_with(spec, tmp_path / "tokenizer", [END], [])
    with pytest.raises(ConfigError) as caught:
        tokens(tmp_path / "a.jsonl", tmp_path, tokenizer=name).bind(ReaderSpec(vocabulary=256))
    assert str(caught.value) == (
        f"data.tokenizer: {name} begins documents with token id 256, but the target takes ids below 256; "
        "choose a tokenizer made for the target"
    )


@pytest.mark.parametrize("letter", ["a", "1", "?"])
def test_the_begin_is_found_where_the_vocabulary_lacks_letters(letter: str) -> None:
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({letter: 0, "<bos>": 1}, unk_token="?"))
    if letter != "?":
        tokenizer.model = models.BPE({letter: 0, "<bos>": 1}, [])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert begin_of(made) == (1,)


@pytest.mark.parametrize(
    ("model", "auto_class", "pack", "remarked"),
    [
        ("bert_classifier", "sequence_classification", True, True),
        ("bert_classifier", "sequence_classification", False, False),
        ("bert", "masked_lm", True, False),
    ],
)
def test_packed_rows_for_a_head_that_reads_a_whole_text_are_remarked_on(
    model: str, auto_class: str, pack: bool, remarked: bool, tmp_path: Path
) -> None:
    saved_model(model, tmp_path / "model")
    rows = [{"ids": [4 + number % 40, 5, 6, 7, 8]} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = compose(
        [
            *("experiment=none", f"name={model}", "device=cpu", f"out_dir={tmp_path / 'runs'}"),
            *("model=hf", f"model.name={tmp_path / 'model'}", f"model.auto_class={auto_class}"),
            *("decomposition=blocks", "decomposition.C=6", "ci_fn=mlp", "ci_fn.hidden=4"),
            *("data=tokens", f"data.name={tmp_path / 'a.jsonl'}", "data.token_column=ids", "data.length=5"),
            *(f"data.pack={str(pack).lower()}", f"cache_dir={tmp_path / 'cache'}"),
        ]
    )
    found = [line for line in remarks(preflight(config)) if line.startswith("data.pack")]
    text = (
        "data.pack: true joins texts and cuts them into rows, but model.auto_class=sequence_classification "
        "answers for a whole text, as of BERT by its first token; data.pack=false takes one text per row"
    )
    assert found == [text] * remarked
