"""Weights of a target, and what is known of it, in one safetensors file that knows their digest."""

import hashlib
import json
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from spd_hydra import atomic

_HEADER = "spd_hydra"  # one entry: with several, their order in the file, and so its bytes, would vary


class WeightsError(ValueError):
    """A file does not hold the weights that were asked for; the message names the file and the reason."""


def save_target(
    module: nn.Module, path: Path, metadata: dict[str, str] | None = None, *, only_digest: bool = False
) -> None:
    """Write every parameter and buffer of a module, tied ones once, so that the file appears whole.

    Args:
        module: on any device.
        path: in a directory that exists; replaced if it is there.
        metadata: remembered in the header, given back by `target_metadata`.
        only_digest: write what tells these weights from others, not the weights.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(module).items()}
    metadata = metadata or {}
    weights = _digest(tensors)
    header: dict[str, Any] = {"sha256": _whole(weights, metadata), "weights": weights, "metadata": metadata}
    if only_digest:
        header, tensors = header | {"only_digest": True}, {}
    text = json.dumps(header, sort_keys=True)
    atomic.replace(path, safetensors.torch.save(tensors, metadata={_HEADER: text}))


def target_metadata(path: Path) -> dict[str, str]:
    """What was saved with the weights.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is damaged.
    """
    header, _ = _read(path)
    return dict[str, str](header["metadata"])


def holds_weights(path: Path) -> bool:
    """Whether a file that `save_target` wrote holds the weights, or only their digest."""
    header, _ = _read(path)
    return "only_digest" not in header


def weights_digest(path: Path) -> str:
    """What tells the weights of a file from others, whatever else is remembered with them.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is damaged.
    """
    header, _ = _read(path)
    return str(header["weights"])


def require_same_weights(module: nn.Module, path: Path) -> None:
    """Check that a module has the weights whose digest was saved.

    Raises:
        WeightsError: it has others.
    """
    header, _ = _read(path)
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(module).items()}
    if _digest(own) != header["weights"]:
        raise WeightsError(
            f"{path} was written for other weights of the target than those that are found now; give the "
            "model as it was when the run began"
        )


def load_target_weights(module: nn.Module, path: Path) -> dict[str, str]:
    """Fill a module of the same shape with saved weights; return the metadata saved with them.

    Raises:
        FileNotFoundError: there is no such file.
        WeightsError: the file is damaged, or it holds the weights of another model.
    """
    header, tensors = _read(path)
    if header["weights"] != _digest(tensors):
        raise WeightsError(f"{path} is damaged (its digest does not match); delete it to have it made again")
    wanted = _tensors(module)
    found_shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wanted_shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    if found_shapes != wanted_shapes:
        raise WeightsError(
            f"{path} holds the weights of another model: {found_shapes}, wanted {wanted_shapes}"
        )
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(tensors[name])
    return dict[str, str](header["metadata"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file, which are mapped and not read until they are used."""
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        whole = _whole(header["weights"], dict[str, str](header["metadata"]))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise WeightsError(f"{path} is damaged ({error}); delete it to have it made again") from error
    if header.get("sha256") != whole:
        raise WeightsError(f"{path} is damaged (its digest does not match); delete it to have it made again")
    return header, tensors


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, each under its first name only, and buffers that are part of the state."""
    persistent = module.state_dict().keys()
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in persistent}
    return dict(module.named_parameters()) | buffers


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _whole(weights: str, metadata: dict[str, str]) -> str:
    """A digest of what a header says."""
    return hashlib.sha256(f"{weights}\n{json.dumps(metadata, sort_keys=True)}".encode()).hexdigest()
