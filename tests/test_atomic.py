"""Text in files that are replaced: every string can be written, and JSON reads it back."""

import json
import os
from pathlib import Path

from spd_hydra import atomic


def test_a_path_that_is_not_utf_8_is_read_back_from_json_as_it_was(tmp_path: Path) -> None:
    path = os.fsdecode(b"/data/caf\xe9/\xff")
    atomic.replace(tmp_path / "a", json.dumps({"path": path, "name": "β"}, ensure_ascii=False))
    text = (tmp_path / "a").read_text(encoding="utf-8")
    assert text == r'{"path": "/data/caf\udce9/\udcff", "name": "β"}'
    assert os.fsencode(json.loads(text)["path"]) == b"/data/caf\xe9/\xff"


def test_other_text_that_is_not_utf_8_becomes_text_that_everybody_can_read(tmp_path: Path) -> None:
    atomic.replace(tmp_path / "a", "caf\udce9, β")
    assert (tmp_path / "a").read_text(encoding="utf-8") == r"caf\udce9, β"
