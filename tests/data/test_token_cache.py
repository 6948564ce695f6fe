"""Text in the cache: told from changed text, and a cache that cannot be used."""

import errno
import os
from pathlib import Path
from typing import Any, NoReturn

import pytest
from tests.data.reader import ReaderSpec
from tests.data.test_tokens import TEXTS, texts_of, tokens, write_jsonl

from spd_hydra.data.token_batches import TokenBatches
from spd_hydra.section import ConfigError


def test_content_changes_with_the_text_and_not_when_a_file_is_only_touched(
    spec: ReaderSpec, tmp_path: Path
) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path)
    source = tokens(path, tmp_path)
    first = source.bind(spec).content()
    os.utime(path, (1, 1))
    touched = source.bind(spec).content()
    path.write_text(path.read_text().replace(TEXTS[7], TEXTS[7].upper()))
    changed = {source.bind(spec).content(), source.bind_eval(spec).content()}
    assert first == touched
    assert first not in changed
    assert None not in changed


def test_a_stream_has_no_content(spec: ReaderSpec, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    assert tokens(tmp_path / "a.jsonl", tmp_path, streaming=True).bind(spec).content() is None


def test_a_cache_in_a_home_directory_that_is_not_there_is_refused(spec: ReaderSpec, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    source = tokens(tmp_path / "a.jsonl", tmp_path)
    source.cache_dir = "~nosuchuser/x"
    with pytest.raises(ConfigError, match=r"^cache_dir: got ~nosuchuser/x, but there is no home directory"):
        source.bind(spec)


def test_a_disk_that_is_full_while_tokenising_is_told_in_one_line(
    spec: ReaderSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def full(*arguments: Any, **more: Any) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    write_jsonl(tmp_path / "a.jsonl")
    batches = tokens(tmp_path / "a.jsonl", tmp_path).bind(spec)
    assert isinstance(batches, TokenBatches)
    monkeypatch.setattr(datasets.Dataset, "map", full)  # on a real one, the library leaves files open
    with pytest.raises(ConfigError) as caught:
        texts_of(batches, 1)
    message = str(caught.value)
    assert message.startswith(f"cache_dir: cannot write {tmp_path / 'cache' / 'tokens'}/.{batches.digest}")
    assert message.endswith(
        ".tmp/train.arrow: No space left on device; check that it is writable and has room, or choose "
        "another place with cache_dir=…"
    )
    assert [path.suffix for path in (tmp_path / "cache" / "tokens").iterdir()] == [".lock"]
