"""Secrets do not reach what is written; ordinary settings do."""

import logging
from typing import Any

import pytest

from spd_hydra.redaction import HIDDEN, Formatter, redact, redact_command, redact_text

CANARY = "canary-4711-canary"


@pytest.fixture(autouse=True)
def _no_secrets_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {})


@pytest.mark.parametrize(
    "name",
    [
        "api_key", "apiKey", "API_KEY", "wandb_api_key", "token", "HF_TOKEN", "hf-token", "accessToken",
        "secret", "client_secret", "password", "db_password", "passwd", "credentials", "auth", "github_pat",
    ],
)  # fmt: skip
def test_text_under_a_secret_s_name_is_hidden_at_any_depth(name: str) -> None:
    tree: dict[str, Any] = {"train": {"x": [{name: CANARY}]}, name: {"inner": CANARY, "list": [CANARY]}}
    shown = redact(tree)
    assert CANARY not in str(shown)
    assert shown["train"]["x"][0][name] == HIDDEN
    assert tree["train"]["x"][0][name] == CANARY, "the original stays as it is"


@pytest.mark.parametrize(
    "tree",
    [
        {
            "tokenizer": "gpt2",
            "n_tokens": 512,
            "max_token": 3,
            "keyboard": "a",
            "monkey": "b",
            "capital": "c",
        },
        {"eos_token": "</s>", "pad_token": "[PAD]", "tokens_path": "/data/x"},
        {"key": 3, "token": None, "use_auth": True, "api": 2.5},
        {"data": {"name": "tokens"}, "sites": {"embed": {"C": 20}}, "list": [1, 2.5, "x", None, True]},
        {"empty": {"api_key": ""}},
        {"data": {"token_column": "ids"}},
        {"decomposition": {"sites": {"key": {"pattern": "*.key", "C": 3}}, "tied": {"a.key": "b.key"}}},
    ],
)
def test_ordinary_settings_stay_as_they_are(tree: dict[str, Any]) -> None:
    assert redact(tree) == tree


def test_passwords_are_hidden_also_among_the_names_of_modules() -> None:
    tree = {"decomposition": {"sites": {"password": CANARY, "key": "hf_" + "aB3" * 8}, "api_key": CANARY}}
    hidden = {"decomposition": {"sites": {"password": HIDDEN, "key": HIDDEN}, "api_key": HIDDEN}}
    assert redact(tree) == hidden
    assert redact({"token": {"column": CANARY}}) == {"token": {"column": HIDDEN}}


def test_numbers_under_a_password_are_hidden() -> None:
    assert redact({"password": 1234, "secret": 5.0}) == {"password": HIDDEN, "secret": HIDDEN}


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "aB3" * 8,
        "ghp_" + "a" * 36,
        "github_pat_" + "a" * 22,
        "sk-" + "a1" * 12,
        "AKIA" + "A" * 16,
    ],
)
def test_known_forms_of_secrets_are_hidden_wherever_they_stand(text: str) -> None:
    assert text not in str(redact({"note": f"see {text}, please"}))
    assert text not in redact_text(f"+x = {text}\n")


def test_the_password_in_an_address_is_hidden_and_the_address_stays() -> None:
    assert redact_text("https://me:hunter2@example.org/a") == f"https://{HIDDEN}@example.org/a"


def test_values_of_secret_environment_variables_are_hidden_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.environ", {"HF_TOKEN": CANARY, "HOME": "/home/researcher", "PIN_TOKEN": "on"})
    shown = redact_text(f"run from /home/researcher with {CANARY} on cpu")
    assert shown == f"run from /home/researcher with {HIDDEN} on cpu"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["a.api_key=canary"], ["a.api_key=<redacted>"]),
        (["++hydra.x.token='can ary'"], ["++hydra.x.token=<redacted>"]),
        (["--token", "canary", "seed=1"], ["--token", "<redacted>", "seed=1"]),
        (["--token=canary"], ["--token=<redacted>"]),
        (["launcher.env={HF_TOKEN:canary,B:c}"], ["launcher.env={HF_TOKEN:<redacted>,B:c}"]),
        (["env={'API_KEY': 'canary'}"], ["env={'API_KEY': <redacted>}"]),
        (["password=1234"], ["password=<redacted>"]),
        (["seed=3", "data.n_tokens=5", "key=3", "experiment=tms_5-2"],) * 2,
        (["'decomposition.sites={ffn:{pattern:layers.*.mlp,C:64}}'"],) * 2,
        (["data.token_column=ids", "decomposition.sites.key.pattern=*.key"],) * 2,
        (["train.lr=1e-3", "loss.key.coeff=2.5e-5", "-m", "seed=range(5)"],) * 2,
    ],
)
def test_command_lines_keep_everything_but_secrets(arguments: list[str], shown: list[str]) -> None:
    assert redact_command(arguments) == shown


def test_log_lines_of_hydra_are_command_lines_and_others_keep_their_words() -> None:
    def shown(logger: str, text: str) -> str:
        return Formatter().format(logging.LogRecord(logger, logging.INFO, "", 0, text, (), None))

    assert (
        shown("hydra.launcher", f"#0 : seed=1 +my.api_token={CANARY}")
        == f"#0 : seed=1 +my.api_token={HIDDEN}"
    )
    assert shown("spd_hydra", "unknown key: 'stepz'") == "unknown key: 'stepz'"
    assert shown("spd_hydra", "see hf_" + "aB3" * 8) == f"see {HIDDEN}"


def test_a_diff_of_ordinary_code_stays_as_it_is_and_a_literal_secret_goes() -> None:
    diff = '+key = rng.key(seed, "masks")\n+token: str = option("x")\n+API_KEY = "abcdefghijkl"\n'
    assert redact_text(diff) == diff.replace('"abcdefghijkl"', HIDDEN)
