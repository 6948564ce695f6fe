"""The standard library as a text: always the same pieces and tokenizer; targets it cannot feed."""

import sysconfig
from pathlib import Path

import pytest
import torch
from tests.data.reader import ReaderSpec

from spd_hydra import rng
from spd_hydra.data.python_text import PythonText, text_pieces, trained_tokenizer
from spd_hydra.model.lm_tiny import TinyLM
from spd_hydra.model.tms import TMS
from spd_hydra.section import ConfigError

KEY = rng.key(0, "train")


def test_the_pieces_are_the_files_in_order_cut_between_paragraphs() -> None:
    pieces = list(text_pieces())
    library = Path(sysconfig.get_path("stdlib"))
    assert "".join(pieces).startswith((library / "abc.py").read_text(encoding="utf-8")[:1000])
    whole = (library / "textwrap.py").read_text(encoding="utf-8")
    own = [piece for piece in pieces if piece.strip() and piece.strip() in whole]
    assert len(own) > 3
    assert "".join(own).strip() == whole.strip()
    assert all(len(piece) >= 2000 for piece in own[:-1])


def test_the_same_text_gives_the_same_tokenizer_which_has_every_byte_and_loses_nothing() -> None:
    pieces = list(text_pieces())[:50]
    first, second = trained_tokenizer(pieces, 300), trained_tokenizer(pieces, 300)
    assert first.to_str() == second.to_str()
    assert first.get_vocab_size() == 300
    text = "def f(x): return '\u00e9\u4e2d\U0001f600'\n\n\tpass"
    assert first.decode(first.encode(text).ids) == text


@pytest.mark.slow
def test_batches_are_rows_of_the_text_in_the_vocabulary_of_the_target(tmp_path: Path) -> None:
    spec = TinyLM(vocabulary=300, context=32)
    source = PythonText(cache_dir=str(tmp_path))
    batches, held_out = source.bind(spec), source.bind_eval(spec)
    rows = batches(KEY, torch.arange(50))
    assert rows.shape == (50, 32)
    assert rows.min() >= 0
    assert rows.max() < 300
    pieces = "<|endoftext|>".join(text_pieces())
    texts = batches.decode(rows[0].tolist())
    assert texts is not None
    assert "".join(texts).replace("\ufffd", "") in pieces or "<|endoftext|>" in "".join(texts)
    assert held_out.digest == batches.digest
    seen = {tuple(row) for row in batches._open_store().rows("train").tolist()}
    own = {tuple(row) for row in held_out._open_store().rows("eval").tolist()}
    assert len(own) > 1000
    assert len(own & seen) < 0.01 * len(own)  # of a text with tables that repeat themselves
    assert source.prefetch(spec) == [
        f"tokens: {len(batches._open_store().rows('train')):,} rows of 32 to train on, "
        f"{len(held_out._open_store().rows('eval')):,} held out, in "
        f"{tmp_path / 'tokens' / batches.digest}"
    ]


@pytest.mark.parametrize("spec", [TMS(), ReaderSpec(tokenizer="gpt2")])
def test_targets_that_are_not_trained_on_it_are_refused(spec: TMS | ReaderSpec) -> None:
    with pytest.raises(ConfigError, match=r"data: python_text cannot feed .* take data=tokens data.name="):
        PythonText().bind(spec)


def test_a_python_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "abc.py").write_text("x = 1\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(
        ConfigError, match=r"has 6 bytes of them; use another installation of Python, or data="
    ):
        list(text_pieces())
