"""Which matrices of the target are decomposed, into how many subcomponents."""

import dataclasses
import re
from collections.abc import Iterator

from spd_hydra.ci_fn.sigmoid import Sigmoid
from spd_hydra.decomposition.subcomponents import Init
from spd_hydra.section import Problem, Section, option

_SITE_NAME = re.compile(r"[A-Za-z0-9_+-]+")
_C = 512
_DEFAULT_ENTRY = "default"


@dataclasses.dataclass(kw_only=True)
class SitePattern(Section):
    """One or more weight matrices, and the number of subcomponents of each."""

    pattern: str = option(
        help="module path inside the target; * matches any part, dots too, e.g. layers.*.mlp_in"
    )
    C: int | None = option(
        None, "subcomponents of each matrix, may be above its rank; null: decomposition.C", ge=1
    )
    init: Init | None = option(None, "how V and U start; null: decomposition.init")
    lr_factor: float = option(1.0, "factor on train.lr for V and U; a tied site has that of its source", gt=0)

    @property
    def subcomponents(self) -> int:
        """C of an entry of a `Decomposition`, which has given it one."""
        assert self.C is not None, "an entry of no Decomposition needs a C of its own"
        return self.C


@dataclasses.dataclass(kw_only=True)
class Decomposition(Section):
    """What is taken apart and how the pieces are masked.

    Made, every entry has its own C, and `sites` the default entry where it had none: so a saved one says
    all by itself.
    """

    sites: dict[str, SitePattern] = option(
        default_factory=dict, help="matrices to decompose, by a name of your choice"
    )
    default_pattern: str | None = option(
        None, "pattern of the matrices to decompose where sites has no entry; null: none"
    )
    C: int | None = option(
        None, f"subcomponents of each matrix whose entry gives no C of its own; null: {_C}", ge=1
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
        "inputs of the site, far from each other) | detectors (V read one direction of the inputs each)",
    )

    def __post_init__(self) -> None:
        """Make the default entry, and give a C to every entry that has none."""
        if not self.sites and self.default_pattern is not None:
            self.sites = {_DEFAULT_ENTRY: SitePattern(pattern=self.default_pattern)}
        self.sites, self.identities = self._counted(self.sites), self._counted(self.identities)
        super().__post_init__()

    def _counted(self, patterns: dict[str, SitePattern]) -> dict[str, SitePattern]:
        C = self.C if self.C is not None and self.C > 0 else _C
        return {
            name: one if one.C is not None else dataclasses.replace(one, C=C)
            for name, one in patterns.items()
        }

    def problems(self) -> Iterator[Problem]:
        yield from super().problems()
        entries = [*self.sites.values(), *self.identities.values()]
        if self.C is not None and self.C > 0 and entries and all(one.C != self.C for one in entries):
            kinds = {"sites": self.sites, "identities": self.identities}
            own = ", ".join(f"decomposition.{key}.{name}.C" for key, given in kinds.items() for name in given)
            yield Problem("C", f"got {self.C}, but every entry has a C of its own; set {own}")
        for key, patterns in (("sites", self.sites), ("identities", self.identities)):
            for name in patterns:
                if not _SITE_NAME.fullmatch(name):
                    yield Problem(key, f"got the name {name!r}, must be letters, digits and _ + -")
