"""Padding counts nowhere: a batch with padded positions has the loss of the positions that are real."""

import torch
from torch import Tensor, nn

from spd_hydra.ci_fn.base import CausalImportanceFn
from spd_hydra.ci_fn.global_transformer import GlobalTransformerCausalImportance
from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.routing import Routing
from spd_hydra.loss.ascent import Scope, Start
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.hidden_acts_recon import HiddenActsRecon
from spd_hydra.loss.importance_minimality import ImportanceMinimality
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective
from spd_hydra.loss.persistent_recon import PersistentPGDRecon
from spd_hydra.loss.pgd_recon import PGDRecon
from spd_hydra.loss.recon import Recon
from spd_hydra.loss.smooth_l0 import SmoothL0
from spd_hydra.precision import Precision


class PerToken(nn.Module):
    """Logits of each token by itself; padding is read as token 0."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embed, self.unembed = nn.Embedding(5, 3), nn.Linear(3, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.unembed(torch.relu(self.embed(tokens.clamp(min=0))))
        return logits


def objective(
    *, padded: bool, divergence: Divergence = Divergence.mse, ci_fn: CausalImportanceFn | None = None
) -> Objective:
    sites = {name: SitePattern(pattern=name, C=4) for name in ("embed", "unembed")}
    ci_fn = ci_fn or MLPCausalImportance(hidden=4)
    model = DecomposedModel(PerToken(), Decomposition(sites=sites), ci_fn, seed=0)
    losses = LossSet(
        divergence=divergence,
        stochastic_recon=Recon(coeff=1.0),
        importance_minimality=ImportanceMinimality(coeff=1.0, beta=0.5),
        smooth_l0=SmoothL0(coeff=1.0, frequency_coeff=0.5),
        hidden_acts_recon=HiddenActsRecon(coeff=1.0),
        pgd_recon=PGDRecon(coeff=1.0, n_steps=3, step_size=0.3, start=Start.zeros),
        pgd_recon_subset=PGDRecon(coeff=1.0, routing=Routing.uniform_k, scope=Scope.per_datapoint, n_steps=0),
        persistent_pgd_recon=PersistentPGDRecon(coeff=1.0, n_sources=1),
    )
    return Objective(model, losses, precision=Precision.fp32, ci_threshold=0.1, padded=padded)


def test_terms_and_l0_are_those_of_the_real_positions_alone() -> None:
    tokens = torch.tensor([[1, 2, -1, -1], [4, -1, -1, -1], [3, 3, 0, 1]])
    valid = tokens >= 0
    for divergence in (Divergence.mse, Divergence.kl):
        with_padding = objective(padded=True, divergence=divergence)
        alone = objective(padded=False, divergence=divergence)
        columns = len(with_padding.columns(with_padding.losses.active_terms()))
        draws = torch.rand(*tokens.shape, columns, generator=torch.Generator().manual_seed(1))
        schedule = alone.scheduled(0.5)
        ours = with_padding(tokens, draws, schedule)
        theirs = alone(tokens[valid], draws[valid], schedule)
        torch.testing.assert_close(ours, theirs)


def test_a_function_that_looks_at_other_positions_does_not_see_padding() -> None:
    ci_fn = GlobalTransformerCausalImportance(d_model=8, n_heads=2, n_layers=1, d_mlp=8)
    ours = objective(padded=True, ci_fn=ci_fn).inputs(torch.tensor([[1, 2, 4, -1, -1]])).ci
    alone = objective(padded=False, ci_fn=ci_fn).inputs(torch.tensor([[1, 2, 4]])).ci
    for site in ("embed", "unembed"):
        torch.testing.assert_close(ours[site].z[:, :3], alone[site].z, atol=1e-5, rtol=1e-4)


def test_importances_of_a_batch_are_those_of_training_and_see_no_padding() -> None:
    ci_fn = GlobalTransformerCausalImportance(d_model=8, n_heads=2, n_layers=1, d_mlp=8)
    ours = objective(padded=True, ci_fn=ci_fn)
    tokens = torch.tensor([[1, 2, 4, -1, -1], [3, -1, -1, -1, -1]])
    found, trained = ours.model.causal_importances(tokens), ours.inputs(tokens).ci
    alone = objective(padded=False, ci_fn=ci_fn).model.causal_importances(tokens[:1, :3])
    other = ours.model.causal_importances(tokens.clamp(min=0))
    for site in ("embed", "unembed"):
        assert torch.equal(found[site].z, trained[site].z)
        torch.testing.assert_close(found[site].z[:1, :3], alone[site].z, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(found[site].z[:1, :3], other[site].z[:1, :3], atol=1e-3)
