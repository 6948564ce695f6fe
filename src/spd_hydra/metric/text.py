"""What the subcomponents of a model of text respond to: their strongest contexts and their tokens."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from spd_hydra import distributed
from spd_hydra.ci_fn.sigmoid import CausalImportance
from spd_hydra.data.characters import completed
from spd_hydra.loss.objective import Objective
from spd_hydra.metric.evaluation import (
    Context,
    SiteEvaluation,
    SubcomponentText,
    Text,
    TextExample,
    TokenResponse,
)

BEFORE, AFTER = 10, 5  # tokens shown around the one that a subcomponent responds to
EXAMPLES, LONGEST = 4, 128  # sequences that are shown whole, and their tokens
TOKENS = 8  # tokens named per subcomponent
_NOTHING = -1  # in place of a token: padding, or outside of the sequence
_DIGITS = 4

Decode = Callable[[Sequence[int]], list[str] | None]


class TopContexts:
    """The positions of largest g for each of a few subcomponents of a site, with the tokens around them.

    Ties, which are many where g is 1, are broken by z, with which g grows. Holds the best `k` of each.
    """

    def __init__(self, k: int) -> None:
        self._k = k
        self.z: Float[Tensor, "k n"] | None = None
        self.tokens: Int[Tensor, "k n window"]
        self.ci: Float[Tensor, "k n window"]

    def add(
        self,
        z: Float[Tensor, "batch length n"],
        ci: Float[Tensor, "batch length n"],
        tokens: Int[Tensor, "batch length"],
    ) -> None:
        """Look at one batch; a negative token is padding."""
        flat = z.float().masked_fill(tokens[..., None] < 0, -torch.inf).flatten(0, 1)
        best, place = flat.topk(min(self._k, len(flat)), dim=0)
        row, column = place[..., None] // tokens.shape[1], place[..., None] % tokens.shape[1]
        column = column + torch.arange(BEFORE + 1 + AFTER, device=column.device)  # of what is padded below
        found = pad(tokens, (BEFORE, AFTER), value=_NOTHING)[row, column]
        subcomponent = torch.arange(z.shape[-1], device=z.device)[:, None]
        around = pad(ci.float(), (0, 0, BEFORE, AFTER))[row, column, subcomponent]
        if self.z is not None:
            best = torch.cat([self.z, best])
            found, around = torch.cat([self.tokens, found]), torch.cat([self.ci, around])
        self._keep(best, found, around)

    def over_ranks(self) -> None:
        """Take the best of all ranks; each has looked at its own rows."""
        if self.z is None or distributed.world_size() == 1:
            return
        lacking = self._k - len(self.z)
        z, tokens, ci = (
            pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, lacking), value=value)
            for tensor, value in ((self.z, -torch.inf), (self.tokens, _NOTHING), (self.ci, 0.0))
        )
        self._keep(*map(distributed.side_by_side, (z, tokens, ci)))

    def _keep(
        self, z: Float[Tensor, "m n"], tokens: Int[Tensor, "m n window"], ci: Float[Tensor, "m n window"]
    ) -> None:
        """Keep the best of these."""
        self.z, kept = z.topk(min(self._k, len(z)), dim=0)
        wide = kept[..., None].expand(*kept.shape, tokens.shape[-1])
        self.tokens, self.ci = tokens.gather(0, wide), ci.gather(0, wide)

    def contexts(self, n: int, name: Mapping[int, str]) -> list[Context]:
        """The places at which the n-th subcomponent is needed at all, the strongest first."""
        assert self.z is not None, "a batch was added"
        found = []
        for z, ids, ci in zip(
            self.z[:, n].tolist(), self.tokens[:, n].tolist(), self.ci[:, n].tolist(), strict=True
        ):
            if z > -torch.inf and ci[BEFORE] > 0:
                real = [index for index, token in enumerate(ids) if token >= 0]
                found.append(
                    Context(
                        tokens=completed([name[ids[index]] for index in real]),
                        ci=[round(ci[index], _DIGITS) for index in real],
                        at=real.index(BEFORE),
                    )
                )
        return found


class TokenResponses:
    """Mean g of a few subcomponents of a site by token.

    Args:
        vocabulary: the tokens that there are, ascending.
    """

    def __init__(self, vocabulary: Int[Tensor, " tokens"]) -> None:
        self._vocabulary = vocabulary
        self._sums: Tensor | None = None
        self._counts = torch.zeros(len(vocabulary), dtype=torch.float64, device=vocabulary.device)

    def add(self, ci: Float[Tensor, "batch length n"], tokens: Int[Tensor, "batch length"]) -> None:
        """Count one batch; a negative token is padding."""
        valid = tokens >= 0
        index = torch.searchsorted(self._vocabulary, tokens[valid])
        if self._sums is None:
            self._sums = ci.new_zeros(len(self._vocabulary), ci.shape[-1], dtype=torch.float64)
        self._sums.index_add_(0, index, ci[valid].double())
        self._counts += torch.bincount(index, minlength=len(self._vocabulary))

    def over_ranks(self) -> None:
        """Count the rows of all ranks."""
        if self._sums is not None:
            self._sums, self._counts = distributed.exact_sum([self._sums, self._counts])

    def strongest(self, n: int, name: Mapping[int, str]) -> list[TokenResponse]:
        """The tokens of largest mean g; of equal ones the more frequent first."""
        assert self._sums is not None, "a batch was added"
        mean = (self._sums[:, n] / self._counts.clamp(min=1)).tolist()
        counts = self._counts.int().tolist()
        order = sorted(range(len(mean)), key=lambda place: (-mean[place], -counts[place]))
        return [
            TokenResponse(
                token=name[int(self._vocabulary[place])],
                mean_ci=round(mean[place], _DIGITS),
                count=counts[place],
            )
            for place in order[:TOKENS]
            if mean[place] > 0
        ]


@torch.no_grad()
def look(
    objective: Objective,
    batches: Sequence[Int[Tensor, "batch length"]],
    sites: Mapping[str, SiteEvaluation],
    *,
    decode: Decode,
    subcomponents: int,
    contexts: int,
) -> Text:
    """What the heaviest subcomponents of every site respond to, and a few sequences token by token.

    Rows of the same tokens, as a short text gives them again and again, are looked at once. Of several ranks
    each looks at its own rows, and all find what one would find; the sequences are the first of a rank's own.
    A site that is not per token is left out.

    Args:
        objective: the model and the threshold above which a subcomponent is active.
        batches: token ids, negative where they are padding.
        sites: what was measured on the data of all ranks.
        decode: from ids to texts.
        subcomponents: at most so many per site, those of largest mean g, as far as they are alive.
        contexts: at most so many for each.
    """
    new = _without_repeats(batches)
    seen = torch.cat([batch.flatten() for batch in new])
    seen = seen[seen >= 0]
    vocabulary, positions = _seen_by_all(seen)
    chosen = {site: _heaviest(own, subcomponents) for site, own in sites.items()}
    best = {site: TopContexts(contexts) for site in chosen}
    responses = {site: TokenResponses(vocabulary) for site in chosen}
    names = _names(vocabulary.tolist(), decode)
    examples: list[TextExample] = []
    per_token: dict[str, CausalImportance] = {}
    for batch, shown in zip(batches, new, strict=True):
        importances = objective.inputs(batch).ci
        per_token = {site: ci for site, ci in importances.items() if ci.z.shape[:-1] == batch.shape}
        for site, ci in per_token.items():
            if own := chosen[site]:
                lower = ci.lower[..., own].clamp(min=0)
                best[site].add(ci.z[..., own], lower, shown)
                responses[site].add(lower, shown)
        if not examples:
            lowers = {site: ci.lower for site, ci in per_token.items()}
            examples = _examples(shown, lowers, objective.ci_threshold, names)
    for site in per_token:
        best[site].over_ranks()
        responses[site].over_ranks()
    texts = {
        site: _texts(own, sites[site], responses[site], best[site], names)
        for site, own in chosen.items()
        if site in per_token
    }
    return Text(positions=positions, examples=examples, sites=texts)


def _texts(
    indices: Sequence[int],
    site: SiteEvaluation,
    responses: TokenResponses,
    best: TopContexts,
    names: Mapping[int, str],
) -> list[SubcomponentText]:
    """What was seen of the chosen subcomponents of a site."""
    return [
        SubcomponentText(
            index=index,
            mean_ci=float(site.mean_ci[index]),
            density=float(site.density[index]),
            tokens=responses.strongest(n, names),
            contexts=best.contexts(n, names),
        )
        for n, index in enumerate(indices)
    ]


def _without_repeats(batches: Sequence[Int[Tensor, "batch length"]]) -> list[Int[Tensor, "batch length"]]:
    """The batches, with padding in place of rows that an earlier one, or one of an earlier rank, equals."""
    own = torch.cat(list(batches))
    (most,) = distributed.largest([len(own)])
    every = distributed.side_by_side(pad(own, (0, 0, 0, most - len(own)), value=_NOTHING)).cpu().numpy()
    first = {row.tobytes(): place for place, row in reversed(list(enumerate(every)))}
    start = distributed.rank() * most
    is_new = [first[every[start + place].tobytes()] == start + place for place in range(len(own))]
    kept = own.where(torch.tensor(is_new, device=own.device)[:, None], _NOTHING)
    return list(torch.split(kept, [len(batch) for batch in batches]))


def _seen_by_all(tokens: Int[Tensor, " own"]) -> tuple[Int[Tensor, " tokens"], int]:
    """The different tokens that all ranks have seen, ascending, and how many they have seen in all."""
    (most,) = distributed.largest([int(tokens.max()) if len(tokens) else 0])
    (counts,) = distributed.exact_sum([torch.bincount(tokens, minlength=most + 1)])
    return counts.nonzero().flatten(), int(counts.sum())


def _heaviest(site: SiteEvaluation, number: int) -> list[int]:
    order = (-site.mean_ci).argsort(kind="stable")
    return [int(index) for index in order[:number] if site.density[index] > 0]


def _names(ids: list[int], decode: Decode) -> dict[int, str]:
    texts = decode(ids)
    if texts is None:
        return {token: str(token) for token in ids}
    # Half of a character, which UTF-8 cannot write, could not be saved.
    whole = [text.encode("utf-8", "replace").decode() for text in texts]
    return dict(zip(ids, whole, strict=True))


def _examples(
    batch: Int[Tensor, "batch length"],
    ci: Mapping[str, Float[Tensor, "batch length C"]],
    threshold: float,
    names: Mapping[int, str],
) -> list[TextExample]:
    found = []
    for row, tokens in enumerate(batch[:EXAMPLES]):
        shown = (tokens >= 0).nonzero().flatten()[:LONGEST]
        if not len(shown):
            continue
        own = {site: g[row, shown].float().clamp(min=0) for site, g in ci.items()}
        found.append(
            TextExample(
                tokens=completed([names[int(token)] for token in tokens[shown]]),
                active={site: (g > threshold).sum(-1).tolist() for site, g in own.items()},
                total_ci={
                    site: [round(value, _DIGITS) for value in g.sum(-1).tolist()] for site, g in own.items()
                },
            )
        )
    return found
