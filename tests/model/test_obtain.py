"""Obtaining a target: retries until certified, honest failure, a cache that is never trusted blindly."""

import dataclasses
import logging
import math
import os
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

from spd_hydra import rng
from spd_hydra.data.sparse_features import SparseFeatures
from spd_hydra.model import obtain as obtain_module
from spd_hydra.model.base import Measurement, TargetSpec
from spd_hydra.model.obtain import TrainedTarget, obtain_target, out_of_bounds
from spd_hydra.model.tms import TMS
from spd_hydra.model.training import TargetTraining
from spd_hydra.section import ConfigError

DATA = SparseFeatures(feature_probability=0.5)


def quick(**options: object) -> TMS:
    """A target that learns in a moment: as many dimensions as features."""
    return TMS(n_features=3, n_hidden=3, training=TargetTraining(steps=400, batch_size=64, **options))


def obtained(spec: TargetSpec, cache_dir: Path | None = None, seed: int = 0) -> TrainedTarget:
    return obtain_target(spec, DATA.bind(quick()), seed=seed, device="cpu", cache_dir=cache_dir)


@dataclasses.dataclass(kw_only=True)
class PickyTMS(TMS):
    """Certifies only what was built from one derived seed."""

    wanted: int = 0

    def hopeless(self, module: nn.Module) -> bool:
        return False

    def certify(self, module: nn.Module) -> list[Measurement]:
        seed = rng.derived_seed(0, "target", self.wanted)
        bias = self.build(rng.generator(seed, "target_weights")).unembed.bias
        same = torch.allclose(module.get_parameter("unembed.bias"), bias, atol=0.01)
        return [Measurement(name="wanted", value=float(same), lower=1, upper=1)]


def picky(wanted: int, max_tries: int) -> PickyTMS:
    recipe = TargetTraining(steps=1, batch_size=4, lr=1e-4, max_tries=max_tries)
    return PickyTMS(n_features=3, n_hidden=3, training=recipe, wanted=wanted)


def test_a_certified_target_is_frozen_in_evaluation_mode() -> None:
    target = obtained(quick())
    assert target.certified
    assert not target.module.training
    assert not any(parameter.requires_grad for parameter in target.module.parameters())
    assert target.tries == 1
    assert target.seed == rng.derived_seed(0, "target", 0)
    assert not target.cached
    assert target.loss is not None
    assert 0 < target.loss < 0.05


def test_tries_go_on_with_the_next_derived_seed_until_one_is_certified() -> None:
    target = obtained(picky(wanted=3, max_tries=10))
    assert target.certified
    assert target.tries == 4
    assert target.seed == rng.derived_seed(0, "target", 3)


def test_without_any_certified_target_the_best_one_comes_back_and_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    target = obtained(picky(wanted=99, max_tries=3))
    assert not target.certified
    assert target.tries == 3
    assert "No target was certified in 3 tries; this is the best of them, and" in caplog.text
    losses = []
    for number in range(3):
        again = obtained(picky(wanted=number, max_tries=3))
        assert again.certified
        assert again.loss is not None
        losses.append(again.loss)
    assert target.loss == min(losses)


@pytest.mark.parametrize(
    ("losses", "wanted"),
    [([math.nan, 0.3, 0.1], 2), ([math.nan, 0.3, 0.4], 1), ([0.0, 0.5, 0.2], 0), ([0.2, 0.0, 0.9], 1)],
)
def test_of_targets_that_are_not_certified_one_that_diverged_comes_last_and_a_loss_of_0_first(
    monkeypatch: pytest.MonkeyPatch, losses: list[float], wanted: int
) -> None:
    left = iter(losses)
    monkeypatch.setattr(obtain_module, "fresh_loss", lambda *arguments: next(left))
    target = obtained(picky(wanted=99, max_tries=3))
    assert target.loss == losses[wanted]
    assert target.seed == rng.derived_seed(0, "target", wanted)


def test_after_the_one_try_of_target_steps_leaving_it_out_is_advised_before_more_tries(
    caplog: pytest.LogCaptureFixture,
) -> None:
    obtained(picky(wanted=99, max_tries=1))
    (text,) = [record.getMessage() for record in caplog.records if "No target" in record.getMessage()]
    assert "certified in 1 try of 1 step, and" in text
    assert 0 < text.index("target_steps") < text.index("model.training.max_tries")


def test_what_keeps_a_target_from_being_certified_is_told_with_its_bounds() -> None:
    found = [
        Measurement(name="margin", value=-0.6, lower=math.ulp(0.0), upper=math.inf),
        Measurement(name="response", value=0.0, lower=0.5, upper=math.inf),
        Measurement(name="norm_deviation", value=0.01, lower=0, upper=0.1),
        Measurement(name="loss", value=0.25, lower=0, upper=0.125),
        Measurement(name="angle", value=math.nan, lower=0, upper=3),
    ]
    assert out_of_bounds(found) == (
        "margin -0.6, must be > 0; response 0, must be ≥ 0.5; loss 0.25, must be 0 to 0.125; "
        "angle nan, must be 0 to 3"
    )


def test_the_last_try_is_trained_to_its_end_even_if_hopeless() -> None:
    @dataclasses.dataclass(kw_only=True)
    class Hopeless(TMS):
        def hopeless(self, module: nn.Module) -> bool:
            return True

    target = obtained(Hopeless(n_features=3, training=TargetTraining(steps=20, batch_size=4, max_tries=2)))
    assert target.tries == 2
    assert not target.certified


def test_a_loss_above_the_bound_is_not_certified() -> None:
    target = obtained(quick(max_loss=1e-12, max_tries=1))
    assert [m.name for m in target.measurements if not m.passed] == ["loss"]
    assert not target.certified


def test_the_same_seed_gives_the_same_bits_and_another_seed_others() -> None:
    first, again, other = (
        obtained(quick(), seed=seed).module.get_parameter("embed.weight") for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_cache_gives_back_the_same_target(tmp_path: Path) -> None:
    trained, cached = obtained(quick(), tmp_path), obtained(quick(), tmp_path)
    assert not trained.cached
    assert cached.cached
    torch.testing.assert_close(cached.module.state_dict(), trained.module.state_dict(), rtol=0, atol=0)
    for field in ("certified", "seed", "tries", "measurements", "loss"):
        assert getattr(cached, field) == getattr(trained, field)
    assert not any(parameter.requires_grad for parameter in cached.module.parameters())


def test_the_cache_tells_specs_seeds_and_data_apart(tmp_path: Path) -> None:
    obtained(quick(), tmp_path)
    assert not obtained(quick(lr=4e-3), tmp_path).cached
    assert not obtained(quick(), tmp_path, seed=1).cached
    other_data = SparseFeatures(feature_probability=0.4).bind(quick())
    assert not obtain_target(quick(), other_data, seed=0, device="cpu", cache_dir=tmp_path).cached
    assert len(list((tmp_path / "targets").iterdir())) == 4


def test_a_cached_target_that_is_certified_no_more_gives_way_to_the_next_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert obtained(picky(wanted=0, max_tries=3), tmp_path).tries == 1
    certify = PickyTMS.certify

    def stricter(spec: PickyTMS, module: nn.Module) -> list[Measurement]:
        return certify(dataclasses.replace(spec, wanted=2), module)

    monkeypatch.setattr(PickyTMS, "certify", stricter)
    for cached in (False, True):
        target = obtained(picky(wanted=0, max_tries=3), tmp_path)
        assert target.certified
        assert (target.tries, target.cached) == (3, cached)


@pytest.mark.parametrize(
    "damage", [lambda whole: b"", lambda whole: whole[:-1], lambda whole: whole[:-1] + b"\x55"]
)
def test_a_damaged_cache_file_is_trained_again_with_a_warning(
    damage: object, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained = obtained(quick(), tmp_path)
    (file,) = (tmp_path / "targets").iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with caplog.at_level(logging.WARNING):
        again = obtained(quick(), tmp_path)
    assert "The cached target cannot be used and is trained again" in caplog.text
    assert not again.cached
    assert torch.equal(
        again.module.get_parameter("embed.weight"), trained.module.get_parameter("embed.weight")
    )
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_only_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "targets").write_text("not a directory")
    assert obtained(quick(), tmp_path).certified
    (message,) = caplog.messages
    assert message.startswith("The trained target could not be cached: ")


def test_a_cache_that_may_not_be_entered_only_warns(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory() as name:
        closed = Path(name) / "closed"
        closed.mkdir(mode=0)
        obtained(picky(wanted=0, max_tries=1))  # imports what it needs
        root = os.geteuid() == 0  # who may enter everywhere
        try:
            if root:
                os.seteuid(65534)
            assert obtained(picky(wanted=0, max_tries=1), closed / "cache").certified
        finally:
            if root:
                os.seteuid(0)
    (message,) = caplog.messages
    assert message.startswith("The trained target could not be cached: [Errno 13] Permission denied")


def test_a_cache_in_a_home_directory_that_is_not_there_is_refused_before_training() -> None:
    with pytest.raises(ConfigError) as caught:
        obtain_target(quick(), DATA.bind(quick()), seed=0, device="cpu", cache_dir="~nosuchuser/x")
    assert str(caught.value) == (
        "cache_dir: got ~nosuchuser/x, but there is no home directory ~nosuchuser; choose another place with "
        "cache_dir=…"
    )


def test_the_cache_directory_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    obtain_target(quick(), DATA.bind(quick()), seed=0, device="cpu", cache_dir="~/cache")
    assert len(list((tmp_path / "cache" / "targets").glob("*.safetensors"))) == 1


def test_a_target_without_a_recipe_is_returned_as_built(tmp_path: Path) -> None:
    @dataclasses.dataclass(kw_only=True)
    class Plain(TargetSpec):
        def build(self, generator: torch.Generator) -> nn.Module:
            module = nn.Linear(2, 2)
            nn.init.normal_(module.weight, generator=generator)
            return module

    target = obtained(Plain(), tmp_path)
    assert target.tries == 0
    assert target.loss is None
    assert target.certified
    expected = nn.init.normal_(
        torch.empty(2, 2), generator=rng.generator(rng.derived_seed(0, "target", 0), "target_weights")
    )
    assert torch.equal(target.module.get_parameter("weight"), expected)
    assert not list(tmp_path.iterdir())


def test_progress_counts_tries_and_steps() -> None:
    seen: list[tuple[int, int, int]] = []
    spec = picky(wanted=1, max_tries=5)
    obtain_target(
        spec,
        DATA.bind(spec),
        seed=0,
        device="cpu",
        cache_dir=None,
        progress=lambda *where: seen.append(where),
    )
    assert seen == [(0, 1, 1), (1, 1, 1)]


@pytest.mark.slow
def test_the_shipped_recipe_of_tms_5_2_is_certified() -> None:
    target = obtain_target(TMS(), SparseFeatures().bind(TMS()), seed=3, device="cpu", cache_dir=None)
    assert target.certified
