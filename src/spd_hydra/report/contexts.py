"""The part of the page that shows text: sequences coloured by activity, and what subcomponents respond to."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup, escape

from spd_hydra.metric.evaluation import Context, SubcomponentText, Text, TextExample
from spd_hydra.report.numbers import number

LARGEST = 1_000_000  # characters of all subcomponents together; the rest is in the run's directory
LARGEST_EXAMPLES = 500_000
_NAMED_SITES = 12  # in the note of a token, those with most active subcomponents
_LONGEST_TOKEN = 40
_VISIBLE = {"\n": "↵", "\r": "↵", "\t": "→"}


def text_section(text: Text, largest: int = LARGEST) -> dict[str, Any]:
    """What the template shows of a text: `examples`, and by site the subcomponents, with every token escaped.

    Args:
        text: what the evaluation saw.
        largest: characters that the subcomponents may take. All sites get their heaviest ones before any
            gets a further one.
    """
    sites: dict[str, list[Markup]] = {site: [] for site in text.sites}
    left = largest
    for place in range(max(map(len, text.sites.values()), default=0)):
        for site, found in text.sites.items():
            if place < len(found):
                drawn = _subcomponent(found[place])
                left -= len(drawn)
                if left >= 0:
                    sites[site].append(drawn)
        if left < 0:
            break
    known = sum(map(len, text.sites.values()))
    return {
        "positions": text.positions,
        "examples": _examples(text.examples),
        "sites": {site: drawn for site, drawn in sites.items() if drawn},
        "left_out": known - sum(map(len, sites.values())),
    }


def shown(token: str) -> str:
    """A token to look at: line ends and tabs as signs, what cannot be printed as �, at most 40 long."""
    visible = "".join(
        _VISIBLE.get(letter, letter if letter.isprintable() or letter == " " else "�") for letter in token
    )
    return visible if len(visible) <= _LONGEST_TOKEN else f"{visible[: _LONGEST_TOKEN - 1]}…"


def _subcomponent(found: SubcomponentText) -> Markup:
    tokens = Markup(" ").join(
        Markup('<span class="token" title="mean g {}, {} times">{}</span>').format(
            number(one.mean_ci), one.count, shown(one.token)
        )
        for one in found.tokens
    )
    contexts = Markup("").join(Markup("<li>{}</li>").format(_context(one)) for one in found.contexts)
    first = shown(found.tokens[0].token) if found.tokens else ""
    return Markup(
        '<details><summary>{} <span class="soft">mean g {}, active at {} of positions</span> '
        '<span class="token">{}</span></summary><p>{}</p><ol class="contexts">{}</ol></details>\n'
    ).format(found.index, number(found.mean_ci), _share(found.density), first, tokens, contexts)


def _context(found: Context) -> Markup:
    parts = []
    for index, (token, ci) in enumerate(zip(found.tokens, found.ci, strict=True)):
        if index == found.at:
            parts.append(
                Markup('<mark style="--g:{}" title="g {}"><b>{}</b></mark>').format(
                    f"{ci:.2f}", number(ci), shown(token)
                )
            )
        elif ci >= 0.01:
            parts.append(Markup('<mark style="--g:{}">{}</mark>').format(f"{ci:.2f}", shown(token)))
        else:
            parts.append(escape(shown(token)))
    return Markup("").join(parts)


def _examples(examples: Sequence[TextExample]) -> list[Markup]:
    """Each sequence as coloured tokens; as many of them as there is room for."""
    counts = [total for one in examples for total in _totals(one)]
    least, most = min(counts, default=0), max(counts, default=0)
    drawn, left = [], LARGEST_EXAMPLES
    for one in examples:
        tokens = Markup("").join(
            Markup('<mark style="--g:{}" title="{}">{}</mark>').format(
                f"{(total - least) / max(most - least, 1):.2f}",
                _note(one, place, total),
                shown(one.tokens[place]),
            )
            for place, total in enumerate(_totals(one))
        )
        left -= len(tokens)
        if left >= 0:
            drawn.append(tokens)
    return drawn


def _totals(example: TextExample) -> list[int]:
    return [sum(own[place] for own in example.active.values()) for place in range(len(example.tokens))]


def _note(example: TextExample, place: int, total: int) -> str:
    """How many subcomponents are active at a token, in all and at each site, with the sums of g."""
    counts = {site: own[place] for site, own in example.active.items() if own[place]}
    order = sorted(counts, key=lambda site: -counts[site])
    lines = [
        f"{site}: {counts[site]}, Σ g {number(example.total_ci[site][place])}"
        for site in order[:_NAMED_SITES]
    ]
    if len(order) > _NAMED_SITES:
        lines.append(f"{len(order) - _NAMED_SITES} more sites")
    return "\n".join([f"{total} active", *lines])


def _share(density: float) -> str:
    return f"{100 * density:.3g} %"
