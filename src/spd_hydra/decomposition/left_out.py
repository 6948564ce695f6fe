"""Parameters that the patterns of sites match and that cannot be decomposed."""

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase

from torch import nn

from spd_hydra.decomposition.config import SitePattern
from spd_hydra.decomposition.layers import computes_otherwise


def left_out(target: nn.Module, patterns: Mapping[str, SitePattern], sites: Iterable[str]) -> str | None:
    """One line about matrices and larger tensors that a pattern matches, by themselves or by their module.

    A pattern for every matrix of the blocks of a model with experts, e.g., matches tensors that hold the
    matrices of all experts and are no layers.

    Args:
        target: the model.
        patterns: of the sites, by name.
        sites: the layers that are decomposed.

    Returns:
        Their paths, with * for a number, the class of the module that they belong to, how many they are and
        their share of the target's parameters; None where there are none.
    """
    layers = set(sites)
    decomposed = {id(target.get_submodule(site).weight) for site in layers}
    found: dict[str, str] = {}
    sizes: dict[int, int] = {}
    for name, parameter in target.named_parameters(remove_duplicate=False):
        path = name.rpartition(".")[0]
        owner = target.get_submodule(path)
        is_matched = any(fnmatchcase(text, one.pattern) for text in (name, path) for one in patterns.values())
        is_used = path in layers or (id(parameter) in decomposed and not computes_otherwise(owner))
        if is_matched and parameter.dim() > 1 and not is_used:
            found[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] = type(owner).__name__
            sizes[id(parameter)] = parameter.numel()
    if not found:
        return None
    share = sum(sizes.values()) / sum(parameter.numel() for parameter in target.parameters())
    listed = ", ".join(f"{path} ({kind})" for path, kind in found.items())
    return (
        f"not decomposed, though the patterns match: {len(sizes)} tensors, {share:.1%} of the target's "
        f"parameters, which are no matrices of Linear, Embedding or Conv1D layers: {listed}"
    )
