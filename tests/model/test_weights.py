"""Weight files: whole, self-checking, one tensor per tied parameter."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from spd_hydra import rng
from spd_hydra.model.resid_mlp import ResidMLP
from spd_hydra.model.tms import TMS
from spd_hydra.model.weights import WeightsError, load_target_weights, save_target


def built(spec: TMS | ResidMLP, seed: int) -> nn.Module:
    return spec.build(rng.generator(seed, "t"))


@pytest.mark.parametrize("spec", [TMS(n_hidden_layers=1), ResidMLP(n_features=4, d_embed=9, n_layers=2)])
def test_loading_gives_back_every_weight_and_the_metadata(spec: TMS | ResidMLP, tmp_path: Path) -> None:
    saved, loaded = built(spec, 0), built(spec, 1)
    save_target(saved, tmp_path / "w.safetensors", {"seed": "7"})
    assert load_target_weights(loaded, tmp_path / "w.safetensors") == {"seed": "7"}
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)


def test_a_tied_parameter_is_stored_once_and_stays_tied(tmp_path: Path) -> None:
    module = TMS().build(rng.generator(0, "t"))
    save_target(module, tmp_path / "w.safetensors")
    stored = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert set(stored) == {"embed.weight", "unembed.bias"}
    load_target_weights(module, tmp_path / "w.safetensors")
    assert module.unembed.shared is module.embed.weight


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save_target(built(TMS(), 0), tmp_path / name, {"seed": "7", "tries": "1", "loss": "0.5"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_any_flipped_bit_or_missing_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    module = built(TMS(), 0)
    save_target(module, path)
    whole = path.read_bytes()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        with pytest.raises(WeightsError, match=r"is damaged|holds the weights of another model"):
            load_target_weights(module, path)
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError, match="is damaged"):
            load_target_weights(module, path)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


def test_a_change_of_what_was_saved_with_the_weights_is_found(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    module = built(TMS(), 0)
    save_target(module, path, {"certified": "false"})
    path.write_bytes(path.read_bytes().replace(b"false", b"true "))
    with pytest.raises(WeightsError, match="is damaged"):
        load_target_weights(module, path)


def test_weights_of_another_shape_are_refused_with_both_shapes(tmp_path: Path) -> None:
    save_target(built(TMS(n_features=5), 0), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"another model: .*\(2, 5\).*wanted .*\(2, 6\)"):
        load_target_weights(built(TMS(n_features=6), 0), tmp_path / "w.safetensors")


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_target_weights(built(TMS(), 0), tmp_path / "none.safetensors")
