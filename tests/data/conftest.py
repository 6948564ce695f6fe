"""A target with a tokenizer of bytes, and a cache of `datasets` for every test."""

from pathlib import Path

import pytest
from tests.data.reader import ReaderSpec, save_byte_tokenizer


@pytest.fixture(scope="session")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ReaderSpec:
    """A target of 257 tokens with a tokenizer of bytes."""
    return ReaderSpec(tokenizer=str(save_byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))))


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path / "hf"
