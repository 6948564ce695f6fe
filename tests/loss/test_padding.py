"""Padding counts nowhere: a batch with padded positions has the loss of the positions that are real."""

import torch
from torch import Tensor, nn

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.loss.divergence import Divergence
from spd_hydra.loss.importance_minimality import ImportanceMinimality
from spd_hydra.loss.loss_set import LossSet
from spd_hydra.loss.objective import Objective, Precision
from spd_hydra.loss.recon import Recon


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


def objective(*, padded: bool, divergence: Divergence) -> Objective:
    sites = {name: SitePattern(pattern=name, C=4) for name in ("embed", "unembed")}
    model = DecomposedModel(PerToken(), Decomposition(sites=sites), MLPCausalImportance(hidden=4), seed=0)
    losses = LossSet(
        divergence=divergence,
        stochastic_recon=Recon(coeff=1.0),
        importance_minimality=ImportanceMinimality(coeff=1.0, beta=0.5),
    )
    return Objective(model, losses, precision=Precision.fp32, ci_threshold=0.1, padded=padded)


def test_terms_and_l0_are_those_of_the_real_positions_alone() -> None:
    tokens = torch.tensor([[1, 2, -1, -1], [4, -1, -1, -1], [3, 3, 0, 1]])
    valid = tokens >= 0
    for divergence in Divergence:
        with_padding = objective(padded=True, divergence=divergence)
        alone = objective(padded=False, divergence=divergence)
        columns = len(with_padding.columns(with_padding.losses.active_terms()))
        draws = torch.rand(*tokens.shape, columns, generator=torch.Generator().manual_seed(1))
        ours = with_padding(tokens, draws, {})
        theirs = alone(tokens[valid], draws[valid], {})
        torch.testing.assert_close(ours, theirs)
