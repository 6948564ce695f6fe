"""The training step as one would write it down from the formulas: the yardstick of `step_time.py`.

Uncompiled PyTorch throughout: weight deltas formed, private causal-importance MLPs as einsums over a
`[batch, C, hidden]` tensor, one whole forward pass per reconstruction term, nothing shared between
them. It takes the initial weights of a `DecomposedModel` and imports none of its arithmetic, so that
equal losses and gradients say something about both.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from spd_hydra.build import Parts
from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.ci_fn.shared_mlp import SharedMLPCausalImportance
from spd_hydra.ci_fn.sigmoid import Sigmoid
from spd_hydra.ci_fn.vector_mlp import VectorMLPCausalImportance
from spd_hydra.data.sparse_features import SparseFeatures
from spd_hydra.decomposition.masks import MaskSource
from spd_hydra.decomposition.routing import Routing
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.recon import Recon

LEAK = 0.01
ROUTINGS = (Routing.all, Routing.layerwise, Routing.uniform_k)
CI_FNS = (MLPCausalImportance, SharedMLPCausalImportance, VectorMLPCausalImportance)


@dataclasses.dataclass(frozen=True)
class Mask:
    """How one site is masked: m on its subcomponents, δ on its weight delta, and the rows where it is."""

    m: Float[Tensor, "batch C"]
    delta: Float[Tensor, "batch 1"]
    rows: Tensor | None = None


class PlainStep:
    """One training step: plain losses, `backward`, AdamW.

    Args:
        parts: what the project would train; its weights are copied, its configuration is read.
        dtype: of all arithmetic; float64 for a reference that is exact beside float32.

    Raises:
        ValueError: the configuration asks for something that the plain step does not know.
    """

    def __init__(self, parts: Parts, dtype: torch.dtype = torch.float32) -> None:
        _require_known(parts)
        model = parts.model
        self.config = parts.config
        self.site_names = model.site_names
        self.tied = dict(model.config.tied)
        self.batch_size = parts.config.train.batch_size
        self.n_features = int(parts.config.model.n_features)  # type: ignore[attr-defined]  # a toy has them
        self.parameters = {
            name: p.detach().to(dtype, copy=True).requires_grad_()
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        self.dtype, self.device = dtype, model.device
        self.target = copy.deepcopy(model.target).to(dtype)
        self.sites = {name: _Site(self.target.get_submodule(name)) for name in self.site_names}
        for name, site in self.sites.items():
            parent, _, attribute = name.rpartition(".")
            setattr(self.target.get_submodule(parent), attribute, site)
        self.ci_kind = type(parts.config.ci_fn)
        self.steps_done = 0
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=parts.config.train.lr, weight_decay=0.0
        )

    def step(self, sample: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
        """One update, on the given batch and draws or on new ones; returns every term and `total`."""
        batch, draws = self.sample() if sample is None else sample
        terms = self.losses(batch.to(self.dtype), draws.to(self.dtype))
        self.optimizer.zero_grad()
        torch.autograd.backward(terms["total"])
        self.optimizer.step()
        self.steps_done += 1
        return {name: term.detach() for name, term in terms.items()}

    def sample(self) -> tuple[Tensor, Tensor]:
        """A batch and uniform random numbers, as `losses` takes them, by torch's own generator."""
        data = cast(SparseFeatures, self.config.data)
        shape = (self.batch_size, self.n_features)
        values = data.low + (data.high - data.low) * torch.rand(shape, device=self.device)
        active = torch.rand(shape, device=self.device) < data.feature_probability
        width = sum(sum(self._widths(term)) for term in self._recon_terms().values())
        return values * active, torch.rand(self.batch_size, width, device=self.device)

    def losses(
        self, batch: Float[Tensor, "batch n"], draws: Float[Tensor, "batch columns"]
    ) -> dict[str, Tensor]:
        """Every active term, and their weighted sum as `total`.

        Args:
            batch: input of the target.
            draws: U(0, 1); per recon term those of the routing, then per site C sources and one for the
                weight delta.
        """
        with torch.no_grad():
            clean = self._run(batch, {})
            inputs = {name: site.seen for name, site in self.sites.items()}
        z = {name: self._pre_sigmoid(name, x) for name, x in inputs.items()}
        lower: dict[str, Tensor] = {name: LowerLeaky.apply(value) for name, value in z.items()}  # type: ignore[no-untyped-call]
        terms: dict[str, Tensor] = {}
        if self.config.loss.faithfulness.coeff > 0:
            terms["faithfulness"] = self._faithfulness()
        terms["importance_minimality"] = self._importance_minimality(z)
        recon = self._recon_terms()
        widths = [sum(self._widths(term)) for term in recon.values()]
        for (name, term), own in zip(recon.items(), torch.split(draws, widths, dim=1), strict=True):
            outputs = [self._run(batch, masks) for masks in self._passes(term, lower, own)]
            terms[name] = torch.stack([((output - clean) ** 2).mean() for output in outputs]).mean()
        active = self.config.loss.active_terms()
        terms["total"] = torch.stack([active[name].coeff * value for name, value in terms.items()]).sum()
        return terms

    def _recon_terms(self) -> dict[str, Recon]:
        terms = self.config.loss.active_terms().items()
        return {name: term for name, term in terms if isinstance(term, Recon)}

    def _widths(self, term: Recon) -> list[int]:
        routing = len(self.site_names) + 1 if term.routing is Routing.uniform_k else 0
        return [routing, *(self._V(name).shape[1] + 1 for name in self.site_names)]

    def _passes(self, term: Recon, lower: dict[str, Tensor], draws: Tensor) -> list[dict[str, Mask]]:
        """The masks of every forward pass of a term, by site; a site that is absent keeps its own layer."""
        routing, *sources = torch.split(draws, self._widths(term), dim=1)
        masks = {
            name: Mask(lower[name] + (1 - lower[name]) * own[:, :-1], own[:, -1:])
            for name, own in zip(self.site_names, sources, strict=True)
        }
        if term.routing is Routing.layerwise:
            return [{name: mask} for name, mask in masks.items()]
        if term.routing is Routing.uniform_k:
            n_sites = len(self.site_names)
            k = 1 + (routing[:, -1:] * n_sites).floor()
            rank = routing[:, :-1].argsort(dim=1).argsort(dim=1)  # a random permutation of the sites
            chosen = torch.split(rank < k, 1, dim=1)
            pairs = zip(masks.items(), chosen, strict=True)
            return [{name: dataclasses.replace(mask, rows=rows) for (name, mask), rows in pairs}]
        return [masks]

    def _run(self, batch: Tensor, masks: dict[str, Mask]) -> Tensor:
        for name, site in self.sites.items():
            site.masked = None
            if name in masks:
                site.masked = (self._V(name), self._U(name), self._delta(name), masks[name])
        return cast(Tensor, self.target(batch))

    def _V(self, name: str) -> Tensor:
        if name in self.tied:
            return self._U(self.tied[name]).T
        return self.parameters[f"subcomponents.{name.replace('.', '/')}.V"]

    def _U(self, name: str) -> Tensor:
        if name in self.tied:
            return self._V(self.tied[name]).T
        return self.parameters[f"subcomponents.{name.replace('.', '/')}.U"]

    def _delta(self, name: str) -> Float[Tensor, "d_out d_in"]:
        return cast(Tensor, self.sites[name].layer.weight) - (self._V(name) @ self._U(name)).T

    def _pre_sigmoid(self, name: str, x: Tensor) -> Float[Tensor, "batch C"]:
        prefix = f"ci_fn.sites.{name.replace('.', '/')}."
        own = {key.removeprefix(prefix): p for key, p in self.parameters.items() if key.startswith(prefix)}
        if self.ci_kind is SharedMLPCausalImportance:
            return mlp(own, x)
        if self.ci_kind is VectorMLPCausalImportance:
            before = torch.einsum("bi,ich->bch", x, own["w_in"])
        else:
            before = torch.einsum("bc,ch->bch", torch.einsum("bi,ic->bc", x, self._V(name)), own["w_in"])
        hidden = nn.functional.gelu(before + own["b_in"])
        return torch.einsum("bch,ch->bc", hidden, own["w_out"]) + own["b_out"]

    def _faithfulness(self) -> Tensor:
        deltas = [self._delta(name) for name in self.site_names]
        return torch.stack([(d**2).sum() for d in deltas]).sum() / sum(d.numel() for d in deltas)

    def _importance_minimality(self, z: dict[str, Tensor]) -> Tensor:
        term = self.config.loss.importance_minimality
        total = torch.zeros((), device=self.device)
        for value in z.values():
            upper = torch.where(value > 1, 1 + LEAK * (value - 1), value.clamp(0, 1))
            f = ((upper + term.eps) ** term.p(self.steps_done / self.config.train.steps)).mean(dim=0)
            total = total + (f * (1 + term.beta * torch.log2(1 + len(value) * f))).sum()
        return total


class _Site(nn.Module):
    """A decomposed layer: itself, or the sum of its masked subcomponents and its masked weight delta."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.masked: tuple[Tensor, Tensor, Tensor, Mask] | None = None
        self.seen = torch.empty(0)

    def forward(self, x: Tensor) -> Tensor:
        if self.masked is None:
            self.seen = x
            return cast(Tensor, self.layer(x))
        V, U, delta, mask = self.masked
        y = torch.einsum("bc,co->bo", torch.einsum("bi,ic->bc", x, V) * mask.m, U)
        y = y + mask.delta * torch.einsum("bi,oi->bo", x, delta)
        bias = getattr(self.layer, "bias", None)
        y = y if bias is None else y + bias
        return y if mask.rows is None else torch.where(mask.rows, y, self.layer(x))


def mlp(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    """Linear layers with GELU between them; the parameters are numbered as in `nn.Sequential`."""
    numbers = sorted({int(key.partition(".")[0]) for key in parameters})
    for number in numbers:
        x = torch.einsum("...i,oi->...o", x, parameters[f"{number}.weight"]) + parameters[f"{number}.bias"]
        x = x if number == numbers[-1] else nn.functional.gelu(x)
    return x


class LowerLeaky(torch.autograd.Function):
    """clamp(z, 0, 1); below 0 a negative gradient passes with the leak."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        ctx.save_for_backward(z)
        out: Tensor = z.clamp(0, 1)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        out: Tensor = grad * ((z > 0) & (z <= 1)) + LEAK * grad * ((z <= 0) & (grad < 0))
        return out


def _require_known(parts: Parts) -> None:
    config, term = parts.config, parts.config.loss.importance_minimality
    active = config.loss.active_terms()
    recon = {name: own for name, own in active.items() if isinstance(own, Recon)}
    known = {"faithfulness", "importance_minimality", *recon}
    needs: list[tuple[str, Callable[[], bool]]] = [
        ("ci_fn=mlp, shared_mlp or vector_mlp", lambda: type(config.ci_fn) in CI_FNS),
        ("data=sparse_features", lambda: isinstance(config.data, SparseFeatures)),
        ("decomposition.sigmoid=leaky_hard", lambda: config.decomposition.sigmoid is Sigmoid.leaky_hard),
        ("decomposition.use_delta=true", lambda: config.decomposition.use_delta),
        ("loss.divergence=mse", lambda: config.loss.divergence is Divergence.mse),
        ("a positive loss.importance_minimality.coeff", lambda: term.coeff > 0),
        ("no loss terms but faithfulness, importance_minimality and recon", lambda: active.keys() <= known),
        ("at least one recon term", lambda: bool(recon)),
        (
            "stochastic masks in all recon terms",
            lambda: all(own.masks is MaskSource.stochastic for own in recon.values()),
        ),
        (
            "routing all, layerwise or uniform_k in all recon terms",
            lambda: all(own.routing in ROUTINGS for own in recon.values()),
        ),
        ("n_samples=1", lambda: all(own.n_samples == 1 for own in recon.values())),
    ]
    for text in _unmet(needs):
        raise ValueError(f"{config.name}: the plain step needs {text}")


def _unmet(needs: list[tuple[str, Callable[[], bool]]]) -> Iterator[str]:
    return (text for text, holds in needs if not holds())
