"""A prompt: the tokens that the tokenizer makes, with the causal importances that the model gives them."""

from types import ModuleType

import pytest
import torch

from spd_hydra.explore.prompt import Prompt, look_at


def made() -> Prompt:
    return Prompt(
        tokens=torch.tensor([[7, 9]]),
        texts=[" a", "\n"],
        importances={
            "x": torch.tensor([[0.2, 1.0, 1.0], [0.0, 0.0, 0.3]]),
            "y": torch.tensor([[0.5], [0.0]]),
        },
        z={"x": torch.tensor([[0.2, 1.5, 2.0], [-1.0, -1.0, 0.3]]), "y": torch.tensor([[0.5], [-1.0]])},
    )


def test_the_strongest_come_first_ties_by_z_and_those_at_0_not_at_all() -> None:
    prompt = made()
    assert [(one.site, one.index) for one in prompt.strongest(0, 3)] == [("x", 2), ("x", 1), ("y", 0)]
    (only,) = prompt.strongest(1)
    assert (only.site, only.index) == ("x", 2)
    assert only.ci == pytest.approx(0.3)
    assert prompt.strongest(1, site="y") == []
    with pytest.raises(ValueError, match=r"no such site: \['z'\]; the sites are \['x', 'y'\]"):
        prompt.strongest(0, site="z")


def test_the_table_has_a_line_for_each_token_with_its_spaces_visible() -> None:
    assert repr(made()).splitlines() == [
        "   token  subcomponents of largest g",
        "─  ─────  ──────────────────────────────────────",
        "0  ' a'   x:2 1.00  x:1 1.00  y:0 0.50  x:0 0.20",
        "1  '\\n'   x:2 0.30",
    ]
    assert made().table(site="x", n=1).splitlines()[2] == "0  ' a'   2 1.00"


def test_importances_are_those_of_the_model_for_the_tokens_of_the_text(language: ModuleType) -> None:
    def tokenizer(text: str, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [int(character) for character in text]}

    model = language.hand_made()
    tokenizer_with_names = type(
        "T", (), {"__call__": staticmethod(tokenizer), "decode": decode, "encode": encode}
    )
    prompt = look_at(model, tokenizer_with_names(), "2011")
    assert prompt.tokens.tolist() == [[2, 0, 1, 1]]
    assert prompt.texts == list("2011")
    found = model.causal_importances(torch.tensor([[2, 0, 1, 1]]))
    for site, g in prompt.importances.items():
        assert torch.equal(g, found[site].lower[0])
        assert not g.requires_grad
    with pytest.raises(ValueError, match="got '', of which the tokenizer makes no tokens"):
        look_at(model, tokenizer_with_names(), "")
    with pytest.raises(TypeError, match="text: got a list, must be one text"):
        look_at(model, tokenizer_with_names(), ["2"])


def decode(self: object, ids: list[int], **options: bool) -> str:
    return "".join(map(str, ids))


def encode(self: object, text: str, **options: bool) -> list[int]:
    return [0]
