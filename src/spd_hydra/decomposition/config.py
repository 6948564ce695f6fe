"""Which matrices of the target are decomposed, into how many subcomponents."""

import dataclasses
import re
from collections.abc import Iterator

from spd_hydra.ci_fn.sigmoid import Sigmoid
from spd_hydra.decomposition.subcomponents import Init
from spd_hydra.section import Problem, Section, option

_SITE_NAME = re.compile(r"[A-Za-z0-9_+-]+")


@dataclasses.dataclass(kw_only=True)
class SitePattern(Section):
    """One or more weight matrices, and the number of subcomponents of each."""

    pattern: str = option(
        help="module path inside the target; * matches any part, dots too, e.g. layers.*.mlp_in"
    )
    C: int = option(help="subcomponents of each matrix; may be above its rank", ge=1)


@dataclasses.dataclass(kw_only=True)
class Decomposition(Section):
    """What is taken apart and how the pieces are masked."""

    sites: dict[str, SitePattern] = option(
        default_factory=dict, help="matrices to decompose, by a name of your choice"
    )
    identities: dict[str, SitePattern] = option(
        default_factory=dict,
        help="modules whose input is decomposed, as an identity matrix in front of them; the site of module "
        "m is m.identity",
    )
    tied: dict[str, str] = option(
        default_factory=dict,
        help="site: source, matrices that are each other's transpose; they share one set of subcomponents",
    )
    use_delta: bool = option(
        True, "treat what the subcomponents leave over as one more, randomly masked, piece"
    )
    sigmoid: Sigmoid = option(
        Sigmoid.leaky_hard,
        "from z to causal importance: leaky_hard | leaky_hard_paper (slope below 0 in the value too) | hard "
        "(no leak) | sigmoid",
    )
    init: Init = option(
        Init.normal,
        "how V and U start: normal | aligned (unit vectors scaled to fit the weights) | inputs (V along "
        "inputs of the site, far from each other)",
    )

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        for key, patterns in (("sites", self.sites), ("identities", self.identities)):
            for name in patterns:
                if not _SITE_NAME.fullmatch(name):
                    yield Problem(key, f"got the name {name!r}, must be letters, digits and _ + -")
