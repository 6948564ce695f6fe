"""What a start of the subcomponents at mlp_in of a residual MLP lets through for a lone feature.

    python benchmarks/start_noise.py resid_mlp3 --seed 2

With one subcomponent at its full size and all others at random sizes in [0, 1], what the site writes is off
in the mean by ¼ |W x - U_c V_c·x|² + 1/12 Σ_b≠c |U_b V_b·x|². Each feature has the subcomponent that is best
for it, no two the same. Printed is that over |W x|², at the median, at nine in ten and at the worst of the
features: a subcomponent that does nothing has 0.25.
"""

import argparse

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from spd_hydra.build import assemble, device_of, obtain
from spd_hydra.composition import compose
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.subcomponents import Init
from spd_hydra.factored import dense
from spd_hydra.model.resid_mlp import ResidMLPModel
from spd_hydra.model.tms import PROBE_MAGNITUDE


def noise(model: DecomposedModel, site: str, x: Tensor) -> Tensor:
    """For each input of a site, with the best subcomponent for it, the error above: [inputs]."""
    pieces, wanted = model.pieces(site), x @ model.weight(site).T
    read = x @ pieces.V
    sizes = read.square() * pieces.U.square().sum(1)
    own = (wanted[:, None] - read[..., None] * pieces.U).square().sum(2)
    off = own / 4 + (sizes.sum(1, keepdim=True) - sizes) / 12
    off = off / wanted.square().sum(1, keepdim=True)
    rows, columns = linear_sum_assignment(off.numpy())
    return off[rows, columns]


def main() -> None:
    """Parse the command line, make the starts, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("experiment", choices=["resid_mlp1", "resid_mlp2", "resid_mlp3"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    words = [f"experiment={arguments.experiment}", f"seed={arguments.seed}", *arguments.overrides]
    config = compose(words)
    target = obtain(config, device_of(config)).module
    for init in Init:
        config = compose(words)
        for entry in config.decomposition.sites.values():
            entry.init = init
        model = assemble(config, target, device_of(config)).model
        with torch.no_grad():
            assert isinstance(model.target, ResidMLPModel)
            probe = PROBE_MAGNITUDE * torch.eye(len(model.target.W_E))
            for site, inputs in model.clean_pass(probe).inputs.items():
                if site.endswith("mlp_in"):
                    found = noise(model, site, dense(inputs)).quantile(torch.tensor([0.5, 0.9, 1.0]))
                    numbers = "  ".join(f"{value:.3g}" for value in found.tolist())
                    print(f"{init.name}  {site}  C {model.pieces(site).C}  {numbers}", flush=True)


if __name__ == "__main__":
    main()
