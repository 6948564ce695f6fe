"""A secret that a run is given, in whatever way, is found in no file that a sweep leaves."""

import base64
import gzip
import io
import os
import re
import subprocess
import sys
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

SPD_RUN = Path(sys.executable).with_name("spd-run")
SECRETS = {
    "WANDB_API_KEY": "canaryofwandb" + "a1" * 14,
    "HF_TOKEN": "canary-of-hub-27182818",
    "COMPANY_TOKEN": "canary-of-company-3141",
    "FROM_FILE_TOKEN": "canary-of-dotenv-1618",
    "override": "canary-of-override-1414",
    "nested": "canary-of-nested-1732",
    "hydra": "canary-of-hydra-2236",
    "unknown": "canary-of-unknown-2645",
}
_BLOCK, _HEADER = 32768, 7


def forms(secret: str) -> Iterator[bytes]:
    """The bytes under which a secret may hide: as it is, quoted, in hexadecimal, in base64 at any offset."""
    plain = secret.encode()
    yield from {plain, urllib.parse.quote(secret, safe="").encode(), plain.hex().encode(), plain[::-1]}
    yield from (secret.encode("utf-16-le"), secret.encode("utf-16-be"))
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + plain)
        yield encoded[4 if shift else 0 : -4]


def views(name: str, data: bytes) -> Iterator[bytes]:
    """The bytes of a file, and what is packed into them."""
    yield data
    if data[:2] == b"\x1f\x8b":
        yield from views(name, gzip.decompress(data))
    if data[:4] == b"PK\x03\x04":
        archive = zipfile.ZipFile(io.BytesIO(data))
        for inner in archive.namelist():
            yield from views(inner, archive.read(inner))
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        for text in re.finditer(rb"(?:zTXt|iTXt)[^\0]*\0+(x.*?)(?=IDAT|IEND)", data, re.DOTALL):
            yield zlib.decompressobj().decompress(text[1])
    if name.endswith(".wandb"):  # blocks with fragments: put together, no record is cut by the end of a block
        yield b"".join(fragments(data))
    for text in re.findall(rb"[A-Za-z0-9+/]{400,}={0,2}", data):  # such as the pictures of a report
        yield from views("", base64.b64decode(text[: len(text) // 4 * 4]))


def fragments(data: bytes) -> Iterator[bytes]:
    position = _HEADER
    while position + _HEADER <= len(data):
        if (left := _BLOCK - position % _BLOCK) < _HEADER:
            position += left
            continue
        size = int.from_bytes(data[position + 4 : position + 6], "little")
        yield data[position + _HEADER : position + _HEADER + size]
        position += _HEADER + size


def found_in(folder: Path) -> list[str]:
    """Where which secret lies."""
    found = []
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        seen = list(views(path.name, path.read_bytes()))
        for name, secret in SECRETS.items():
            if any(form in view for form in forms(secret) for view in seen) or secret in str(path):
                found.append(f"{name} in {path.relative_to(folder)}")
    return found


def test_the_search_finds_a_secret_however_it_is_packed(tmp_path: Path) -> None:
    secret = SECRETS["HF_TOKEN"]
    plain, long = secret.encode(), f"{secret} {'x' * 600}".encode()
    start = _BLOCK - 20
    first = start - _HEADER - _HEADER
    packed = b"\0" * _HEADER + b"\0" * 4 + first.to_bytes(2, "little") + b"\1" + b"x" * first
    packed += b"\0" * 4 + (13).to_bytes(2, "little") + b"\2" + plain[:13]
    packed += b"\0" * 4 + (len(plain) - 13).to_bytes(2, "little") + b"\4" + plain[13:]
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner", gzip.compress(plain))
    for name, data in {
        "plain": b"x" + plain,
        "b.gz": gzip.compress(plain),
        "c.html": b"<img src='data:," + base64.b64encode(long) + b"'>",
        "d": base64.b64encode(b"ab" + plain + b"cd"),
        "e.png": b"\x89PNG\r\n\x1a\n0000zTXtnote\0\0" + zlib.compress(plain) + b"0000IEND",
        "f.wandb": packed,
    }.items():
        (tmp_path / name).write_bytes(data)
    assert sorted(found_in(tmp_path)) == [
        f"HF_TOKEN in {n}" for n in ("a.zip", "b.gz", "c.html", "d", "e.png", "f.wandb", "plain")
    ]


@pytest.mark.slow
def test_no_file_of_a_sweep_holds_a_secret(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    work = tmp_path / "work"
    work.mkdir()
    (work / ".env").write_text(f"FROM_FILE_TOKEN={SECRETS['FROM_FILE_TOKEN']}\n")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SPD_", "WANDB_"))}
    given = {name: SECRETS[name] for name in ("WANDB_API_KEY", "HF_TOKEN", "COMPANY_TOKEN")}
    places = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}

    def call(*words: str) -> int:
        log = (tmp_path / "log").open("a")
        with log:  # what a scheduler would keep
            return subprocess.run(
                [SPD_RUN, *words],
                cwd=work,
                env=kept | given | places,
                stdout=log,
                stderr=log,
                timeout=300,
                check=False,
            ).returncode

    words = [
        "debug=smoke",
        "logger=wandb",
        "logger.mode=offline",
        "out_dir=runs",
        "cache_dir=cache",
        "allow_extra=true",
        f"+my.api_token={SECRETS['override']}",
        f"+launch.env={{HF_TOKEN:{SECRETS['nested']}}}",
        f"++hydra.job.env_set.SOME_TOKEN={SECRETS['hydra']}",
        f"+my.note={SECRETS['COMPANY_TOKEN']}",
    ]
    assert call("-m", *words, "train.lr=1e-3,1e30") == 3, (tmp_path / "log").read_text()
    assert call(*words) == 0, (tmp_path / "log").read_text()
    assert call("debug=smoke", f"my.api_token={SECRETS['unknown']}") == 2
    (work / ".env").unlink()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    expected = {
        "multirun.yaml",
        "sweep.csv",
        "config.yaml",
        "environment.json",
        "report.html",
        "log",
        "status.json",
    }
    assert expected <= {path.name for path in files}
    assert sum(path.suffix == ".wandb" for path in files) == 3
    assert found_in(tmp_path) == []
    print(f"{len(SECRETS)} secrets, searched for in {len(files)} files")
