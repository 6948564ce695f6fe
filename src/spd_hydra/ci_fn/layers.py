"""Layers of causal-importance functions, for inputs that are vectors or tokens."""

from collections.abc import Mapping
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding

from spd_hydra.ci_fn.base import SiteShape, kaiming_normal
from spd_hydra.factored import Activation, dense
from spd_hydra.section import ConfigError

HIDDEN_GAIN = 2**0.5  # of weights in front of a GELU; elsewhere 1


def linear(d_in: int, d_out: int, *, gain: float, generator: torch.Generator, bias: bool = True) -> nn.Linear:
    """A linear layer with Kaiming-normal weights and, if it has one, a bias of zero."""
    layer = nn.Linear(d_in, d_out, bias=bias, device="meta")
    layer.weight = kaiming_normal((d_out, d_in), fan_in=d_in, gain=gain, generator=generator)
    if bias:
        layer.bias = nn.Parameter(torch.zeros(d_out))
    return layer


class TokenLinear(nn.Module):
    """A linear layer on one-hot vectors, which are given as tokens and never formed: W[token] + b.

    A single entry of a one-hot vector is not 0, so the weights start with a fan-in of 1.
    """

    def __init__(self, n_tokens: int, d_out: int, *, gain: float, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = kaiming_normal((n_tokens, d_out), fan_in=1, gain=gain, generator=generator)
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, tokens: Int[Tensor, "*positions"]) -> Float[Tensor, "*positions d_out"]:
        return embedding(tokens, self.weight) + self.bias


def gelu_mlp(widths: list[int], generator: torch.Generator, *, of_tokens: bool = False) -> nn.Sequential:
    """Linear layers of the given widths with exact GELU between them, Kaiming-normal weights, zero biases.

    Args:
        widths: of the input, the hidden layers and the output.
        generator: source of the initial weights.
        of_tokens: the input is a token, of `widths[0]` different ones.
    """
    layers: list[nn.Module] = []
    for index, (d_in, d_out) in enumerate(pairwise(widths)):
        is_last = index == len(widths) - 2
        make = TokenLinear if of_tokens and index == 0 else linear
        layer = make(d_in, d_out, gain=1.0 if is_last else HIDDEN_GAIN, generator=generator)
        layers += [layer] if is_last else [layer, nn.GELU()]
    return nn.Sequential(*layers)


class ConcatenatedInputs(nn.Module):
    """A linear layer on the inputs of all S sites, concatenated: y = Σ_l x_l W_l + b.

    As a sum over sites: neither the long vector nor a one-hot one is formed (at an embedding x_l W_l is a
    row of W_l), and an input that is kept as products is read as such.

    The weights start Kaiming-normal for inputs of mean square 1. An embedding has an input width that says
    nothing about how much it tells; it gets the S-th part of the variance of y, as the average site does.

    Args:
        sites: shapes by site.
        d_out: width of y.
        gain: of the initial weights.
        generator: source of the initial weights.
    """

    def __init__(
        self, sites: Mapping[str, SiteShape], d_out: int, *, gain: float, generator: torch.Generator
    ) -> None:
        super().__init__()
        self._embeddings = frozenset(name for name, shape in sites.items() if shape.embedding)
        widths = [shape.d_in for shape in sites.values() if not shape.embedding]
        fan_in = len(sites) * sum(widths) / max(1, len(widths))
        self.weights = nn.ParameterDict(
            {
                site_key(name): kaiming_normal(
                    (shape.d_in, d_out),
                    fan_in=len(sites) if shape.embedding else fan_in,
                    gain=gain,
                    generator=generator,
                )
                for name, shape in sites.items()
            }
        )
        self.bias = nn.Parameter(torch.zeros(d_out))

    def forward(self, inputs: Mapping[str, Activation]) -> Float[Tensor, "*positions d_out"]:
        """y at every position.

        Args:
            inputs: by site, vectors `[*positions, d_in]` or, at an embedding, tokens `[*positions]`. Axes of
                positions may have length 1 at some sites, such as that of the batch at embedded positions.

        Raises:
            ConfigError: the sites do not run at the same positions.
        """
        parts = {name: self._read(name, x) for name, x in inputs.items()}
        _require_same_positions(parts)
        return sum(parts.values(), start=self.bias)

    def _read(self, site: str, x: Activation) -> Tensor:
        weight = self.weights[site_key(site)]
        return embedding(dense(x), weight) if site in self._embeddings else x @ weight


def _require_same_positions(parts: Mapping[str, Tensor]) -> None:
    (first, part), *others = parts.items()
    known = part.shape[:-1]
    for name, part in others:
        own = part.shape[:-1]
        if len(own) != len(known) or any(m != n and 1 not in (m, n) for m, n in zip(own, known, strict=True)):
            raise ConfigError(
                f"ci_fn: global_mlp and global_transformer read the inputs of all sites at one position "
                f"together, but site {first!r} runs at positions of shape {list(known)} and site {name!r} at "
                f"{list(own)}; leave one of them out, or use mlp, vector_mlp or shared_mlp"
            )
        known = torch.Size(map(max, known, own))


def site_key(site: str) -> str:
    """A site's name as that of a submodule or parameter, which allows no dots."""
    return site.replace(".", "/")
