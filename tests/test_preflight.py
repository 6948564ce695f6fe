"""What does not fit together is found before anything is trained."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import nn

from spd_hydra.config import RunConfig
from spd_hydra.model.base import TargetSpec
from spd_hydra.preflight import preflight
from spd_hydra.section import ConfigError

Toy = Callable[..., RunConfig]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["decomposition.sites.embed.pattern=nowhere"], "nowhere"),
        (["model=tms_5-2", "decomposition=resid_mlp1"], "mlp_in"),
        (["decomposition.tied={embed:embed}"], "embed"),
    ],
    ids=["no such site", "sites of another target", "tied to itself"],
)
def test_what_does_not_fit_the_target_is_refused_by_name(
    toy: Toy, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight(toy(*overrides))


def test_a_check_before_training_makes_no_weights(toy: Toy) -> None:
    parts = preflight(
        toy("decomposition.sites.embed.C=1000000000", "decomposition.sites.unembed.C=1000000000")
    )
    assert {parameter.device.type for parameter in parts.model.parameters()} == {"meta"}
    assert parts.model.site_shapes()["embed"].C == 1_000_000_000


def test_a_target_that_needs_values_is_checked_with_them(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    config = toy()
    build = type(config.model).build

    def with_values(spec: TargetSpec, generator: torch.Generator) -> nn.Module:
        module = build(spec, generator)
        assert next(module.parameters()).norm().item() > 0
        return module

    monkeypatch.setattr(type(config.model), "build", with_values)
    assert {p.device.type for p in preflight(config).model.parameters()} == {"cpu"}
    with pytest.raises(ConfigError, match="nowhere"):
        preflight(toy("decomposition.sites.embed.pattern=nowhere"))


def test_a_large_target_that_needs_values_is_refused_without_making_them(
    toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Linear(2**15, 2**13, bias=False)  # 1 GiB
            self.unembed = nn.Linear(4, 4, bias=False)
            self.bias = nn.Parameter(torch.zeros(1))
            made.append(self.embed.weight.device.type)

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            assert self.bias.item() == 0
            return batch

    config = toy("decomposition=tms_5-2-untied")
    monkeypatch.setattr(type(config.model), "build", lambda spec, generator: Wide())
    with pytest.raises(ConfigError) as caught:
        preflight(config)
    message = str(caught.value)
    assert re.match(
        r"model: \S+ cannot be checked without the values of its weights \(RuntimeError: ", message
    )
    assert message.endswith(
        "), which are 1.0 GiB; up to 1 GiB are made for a check. Try a small model of the same kind"
    )
    assert "\n" not in message
    assert set(made) == {"meta"}
