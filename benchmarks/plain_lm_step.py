"""A training step on a language model as one would write it down from the formulas: for `lm_step.py`.

Uncompiled PyTorch: the weight deltas are formed, once per step, masked passes run one after the other, each
through the whole model and with whole activations, and the divergence is taken from two float32
log-softmaxes. It takes the initial weights of a `DecomposedModel` and imports none of its arithmetic.
"""

import copy
from typing import NamedTuple, cast

import torch
from benchmarks.plain_step import LEAK, LowerLeaky, mlp
from jaxtyping import Float, Int
from torch import Tensor, nn

from spd_hydra.build import Parts
from spd_hydra.decomposition.routing import Routing
from spd_hydra.loss.recon import Recon


class Mask(NamedTuple):
    """m, `[batch, length, C]`, δ, `[batch, length, 1]`, and where they hold, `[batch, length, 1]`."""

    m: Tensor
    delta: Tensor
    where: Tensor | None = None  # everywhere


Masks = dict[str, Mask]


class PlainLanguageStep:
    """One training step: plain losses, `backward`, AdamW.

    Args:
        parts: what the project would train, with `shared_mlp`, KL, and stochastic recon of all sites, of a
            uniform subset or of one at a time.
    """

    def __init__(self, parts: Parts) -> None:
        model = parts.model
        self.config, self.site_names, self.device = parts.config, model.site_names, model.device
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters = {name: p.detach().clone().requires_grad_() for name, p in named.items()}
        self.target = copy.deepcopy(model.target)
        self.sites = {name: _Site(self.target.get_submodule(name)) for name in self.site_names}
        for name, site in self.sites.items():
            parent, _, attribute = name.rpartition(".")
            setattr(self.target.get_submodule(parent), attribute, site)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=parts.config.train.lr, weight_decay=0.0
        )

    def step(self, sample: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """One update on the given batch and draws; returns every term and `total`."""
        terms = self.losses(*sample)
        self.optimizer.zero_grad()
        torch.autograd.backward(terms["total"])
        self.optimizer.step()
        return {name: term.detach() for name, term in terms.items()}

    def losses(
        self, batch: Int[Tensor, "batch length"], draws: Float[Tensor, "batch length columns"]
    ) -> dict[str, Tensor]:
        """Every active term, and their weighted sum as `total`."""
        with torch.no_grad():
            clean = self._run(batch, {})
            inputs = {name: site.seen for name, site in self.sites.items()}
        z = {name: mlp(self._parameters_of(f"ci_fn.sites.{_key(name)}."), x) for name, x in inputs.items()}
        lower: dict[str, Tensor] = {name: LowerLeaky.apply(value) for name, value in z.items()}  # type: ignore[no-untyped-call]
        deltas = {name: site.weight - (self._V(name) @ self._U(name)).T for name, site in self.sites.items()}
        active = self.config.loss.active_terms()
        recon = {name: term for name, term in active.items() if isinstance(term, Recon)}
        terms: dict[str, Tensor] = {}
        if "faithfulness" in active:
            squares = torch.stack([(delta**2).sum() for delta in deltas.values()]).sum()
            terms["faithfulness"] = squares / sum(delta.numel() for delta in deltas.values())
        terms["importance_minimality"] = self._importance_minimality(z)
        widths = [sum(self._widths(term)) for term in recon.values()]
        for (name, term), own in zip(recon.items(), torch.split(draws, widths, dim=-1), strict=True):
            passes = self._passes(term, lower, own)
            divergences = [_kl(self._run(batch, masks, deltas), clean) for masks in passes]
            terms[name] = torch.stack(divergences).mean()
        parts = [active[name].coeff * value for name, value in terms.items()]
        return terms | {"total": torch.stack(parts).sum()}

    def _widths(self, term: Recon) -> list[int]:
        routing = len(self.site_names) + 1 if term.routing is Routing.uniform_k else 0
        return [routing, *(self._V(name).shape[1] + 1 for name in self.site_names)]

    def _passes(self, term: Recon, lower: dict[str, Tensor], draws: Tensor) -> list[Masks]:
        """The masks of every forward pass of a term; a site that is absent keeps its own layer."""
        routing, *sources = torch.split(draws, self._widths(term), dim=-1)
        masks = {
            name: Mask(lower[name] + (1 - lower[name]) * r[..., :-1], r[..., -1:])
            for name, r in zip(self.site_names, sources, strict=True)
        }
        if term.routing is Routing.layerwise:
            return [{name: mask} for name, mask in masks.items()]
        if term.routing is Routing.uniform_k:
            k = 1 + (routing[..., -1:] * len(self.site_names)).floor()
            rank = routing[..., :-1].argsort(dim=-1).argsort(dim=-1)  # a random permutation of the sites
            chosen = torch.split(rank < k, 1, dim=-1)
            pairs = zip(masks.items(), chosen, strict=True)
            return [{name: mask._replace(where=where) for (name, mask), where in pairs}]
        return [masks]

    def _run(self, batch: Tensor, masks: Masks, deltas: dict[str, Tensor] | None = None) -> Tensor:
        for name, site in self.sites.items():
            site.masked = None
            if deltas is not None and name in masks:
                site.masked = (self._V(name), self._U(name), deltas[name], masks[name])
        return cast(Tensor, self.target(batch))

    def _V(self, name: str) -> Float[Tensor, "d_in C"]:
        return self.parameters[f"subcomponents.{_key(name)}.V"]

    def _U(self, name: str) -> Float[Tensor, "C d_out"]:
        return self.parameters[f"subcomponents.{_key(name)}.U"]

    def _parameters_of(self, prefix: str) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): p for key, p in self.parameters.items() if key.startswith(prefix)}

    def _importance_minimality(self, z: dict[str, Tensor]) -> Tensor:
        term = self.config.loss.importance_minimality
        total = torch.zeros((), device=self.device)
        for value in z.values():
            upper = torch.where(value > 1, 1 + LEAK * (value - 1), value.clamp(0, 1))
            f = ((upper + term.eps) ** term.p_start).mean(dim=(0, 1))
            total = total + (f * (1 + term.beta * torch.log2(1 + value[..., 0].numel() * f))).sum()
        return total


class _Site(nn.Module):
    """A decomposed Linear or Conv1D: itself, or its masked subcomponents and its masked weight delta."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.masked: tuple[Tensor, Tensor, Tensor, Mask] | None = None
        self.seen = torch.empty(0)

    @property
    def weight(self) -> Float[Tensor, "d_out d_in"]:
        weight = cast(Tensor, self.layer.weight)
        return weight if isinstance(self.layer, nn.Linear) else weight.T

    def forward(self, x: Tensor) -> Tensor:
        if self.masked is None:
            self.seen = x
            return cast(Tensor, self.layer(x))
        V, U, delta, mask = self.masked
        y = (x @ V * mask.m) @ U + mask.delta * (x @ delta.T)
        bias = cast(Tensor | None, self.layer.bias)
        y = y if bias is None else y + bias
        return y if mask.where is None else torch.where(mask.where, y, self.layer(x))


def _kl(masked: Float[Tensor, "batch length vocabulary"], target: Tensor) -> Float[Tensor, ""]:
    log_p, log_q = torch.log_softmax(target, dim=-1), torch.log_softmax(masked, dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _key(site: str) -> str:
    return site.replace(".", "/")
