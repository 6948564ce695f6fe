"""A text through a decomposition: its tokens, and which subcomponents each of them needs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from spd_hydra.data.characters import completed
from spd_hydra.data.tokenizing import decoded
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.masks import no_such_site
from spd_hydra.report.numbers import text_table

_SHOWN = 4  # subcomponents per token


@dataclasses.dataclass(frozen=True)
class Needed:
    """A subcomponent of a site and its causal importance g at one position."""

    site: str
    index: int
    ci: float


@dataclasses.dataclass(frozen=True, repr=False)
class Prompt:
    """Tokens of a text with the causal importances of all subcomponents at each.

    Attributes:
        tokens: their ids, `[1, length]`, as `run.model` takes them.
        texts: each token as it reads in running text.
        importances: g by site, the lower one, `[length, C]`.
        z: what g is made from, before the sigmoid, by site; orders those whose g is 1.
    """

    tokens: Int64[Tensor, "1 length"]
    texts: list[str]
    importances: dict[str, Float[Tensor, "length C"]]
    z: dict[str, Float[Tensor, "length C"]]

    def strongest(self, position: int, n: int = _SHOWN, *, site: str | None = None) -> list[Needed]:
        """The subcomponents of largest g > 0 at a position, of one site or of all, the largest first.

        Ties, which are many at g = 1, are broken by z.
        """
        if site is not None and site not in self.importances:
            raise no_such_site([site], self.importances)
        found = []
        for name in self.importances if site is None else [site]:
            g, z = self.importances[name][position].tolist(), self.z[name][position].tolist()
            found += [(ci, z[index], Needed(name, index, ci)) for index, ci in enumerate(g) if ci > 0]
        return [needed for *_, needed in sorted(found, key=lambda one: (-one[0], -one[1]))[:n]]

    def table(self, *, site: str | None = None, n: int = _SHOWN) -> str:
        """For each token the `n` subcomponents of largest g, of one site or of all, as text."""
        rows = []
        for position, token in enumerate(self.texts):
            needed = [
                f"{'' if site else one.site + ':'}{one.index} {one.ci:.2f}"
                for one in self.strongest(position, n, site=site)
            ]
            rows.append([str(position), quoted(token), "  ".join(needed)])
        what = "subcomponents of largest g" + (f" at {site}" if site else "")
        return "\n".join(text_table(["", "token", what], rows, left=[1, 2], indent=""))

    def __repr__(self) -> str:
        return self.table()


@torch.no_grad()
def look_at(model: DecomposedModel, tokenizer: Any, text: str) -> Prompt:
    """The prompt of a text, which begins and ends as its tokenizer has it; sites that are not per token lack.

    Raises:
        ValueError: the text has no tokens, or more than the target takes.
    """
    if not isinstance(text, str):
        raise TypeError(f"text: got a {type(text).__name__}, must be one text; take several one by one")
    ids = tokenizer(text, verbose=False)["input_ids"]
    if not ids:
        raise ValueError(f"text: got {text!r}, of which the tokenizer makes no tokens")
    tokens = torch.tensor([ids], device=model.device)
    found = {
        site: ci
        for site, ci in model.causal_importances(tokens).items()
        if ci.lower.shape[:-1] == tokens.shape
    }
    importances, z = ({site: getattr(ci, name)[0] for site, ci in found.items()} for name in ("lower", "z"))
    return Prompt(tokens, token_texts(tokenizer, ids), importances, z)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token of a text as it reads there; without a tokenizer its id."""
    names = decoded(tokenizer, ids)
    return [str(token) for token in ids] if names is None else completed(names)


def quoted(token: str) -> str:
    """A token so that its spaces and line ends are seen."""
    return "'" + token.replace("\n", "\\n").replace("\t", "\\t").replace("\r", "\\r") + "'"
