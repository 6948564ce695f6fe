"""The text of a report: all of it escaped, coloured by activity, and no larger than it may be."""

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from spd_hydra.metric.evaluation import Context, SubcomponentText, Text, TextExample, TokenResponse
from spd_hydra.report import write_report
from spd_hydra.report.contexts import LARGEST, LARGEST_EXAMPLES, shown, text_section

HOSTILE = "</mark><script>alert(1)</script>\"'&"


class Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def text_of(token: str, *, sites: int = 1, subcomponents: int = 1, contexts: int = 1) -> Text:
    one = Context(tokens=[token, token, " b"], ci=[0.5, 1.0, 0.0], at=1)
    described = SubcomponentText(
        index=7, mean_ci=0.25, density=0.5, contexts=[one] * contexts,
        tokens=[TokenResponse(token=token, mean_ci=0.75, count=3)],
    )  # fmt: skip
    names = [f"h.{index}.{token}" for index in range(sites)]
    example = TextExample(
        tokens=[token, " b"], active={name: [3, 1] for name in names}, total_ci={n: [2.5, 1.0] for n in names}
    )
    return Text(
        positions=100, examples=[example], sites={name: [described] * subcomponents for name in names}
    )


@pytest.fixture
def page(synthetic: Any, summaries: Any, tmp_path: Path) -> Any:
    def written(text: Text) -> str:
        evaluation = synthetic.language_model(n_sites=1)
        object.__setattr__(evaluation, "text", text)
        path = tmp_path / "report.html"
        write_report(
            path, summary=summaries.summary_of(evaluation, "lm"), evaluation=evaluation, history=[],
            figures=[], config_text=summaries.CONFIG, environment=summaries.ENVIRONMENT,
        )  # fmt: skip
        return path.read_text()

    return written


def test_hostile_tokens_and_sites_stay_text(page: Any) -> None:
    found = Tags(page(text_of(HOSTILE)))
    assert "script" not in {tag for tag, _ in found.tags}
    assert found.text.count(HOSTILE) >= 4  # example, token, context twice
    assert any(HOSTILE in (attributes.get("title") or "") for _, attributes in found.tags)
    allowed = {"style", "title", "class"}
    marks = [set(attributes) for tag, attributes in found.tags if tag in {"mark", "span"}]
    assert all(names <= allowed for names in marks)


def test_the_text_needs_no_script_and_nothing_from_outside(page: Any) -> None:
    found = Tags(page(text_of(" a")))
    assert [tag for tag, _ in found.tags].count("details") >= 2  # the site, and the subcomponent in it
    assert not any({"src", "href", "onclick"} & set(attributes) for _, attributes in found.tags)


def test_a_context_is_coloured_by_g_and_its_place_is_bold() -> None:
    section = text_section(text_of(" a"))
    drawn = next(iter(section["sites"].values()))[0]
    assert (
        '<li><mark style="--g:0.50"> a</mark><mark style="--g:1.00" title="g 1"><b> a</b></mark> b</li>'
        in drawn
    )
    assert "mean g 0.2500, active at 50 % of positions" in drawn


def test_examples_are_coloured_from_the_least_to_the_most_active_and_say_where() -> None:
    text = text_of("a", sites=2)
    (drawn,) = text_section(text)["examples"]
    assert drawn == (
        '<mark style="--g:1.00" title="6 active\nh.0.a: 3, Σ g 2.5000\nh.1.a: 3, Σ g 2.5000">a</mark>'
        '<mark style="--g:0.00" title="2 active\nh.0.a: 1, Σ g 1\nh.1.a: 1, Σ g 1"> b</mark>'
    )


def test_of_many_sites_the_most_active_are_named() -> None:
    (drawn,) = text_section(text_of("a", sites=30))["examples"]
    assert "\n18 more sites" in drawn
    assert drawn.count("Σ g") == 2 * 12


@pytest.mark.parametrize("largest", [0, 3_000, LARGEST])
def test_the_section_is_bounded_and_every_site_gets_its_share(largest: int) -> None:
    text = text_of("&" * 30, sites=24, subcomponents=20, contexts=8)
    section = text_section(text, largest)
    drawn = [one for own in section["sites"].values() for one in own]
    assert sum(map(len, drawn)) <= largest
    assert section["left_out"] == 24 * 20 - len(drawn)
    counts = {len(own) for own in section["sites"].values()}
    assert max(counts, default=0) - min(counts, default=0) <= 1


def test_a_page_with_far_too_much_text_stays_below_two_megabytes(page: Any, synthetic: Any) -> None:
    text = synthetic.language_model(n_sites=30, C=100).text
    whole = page(text)
    assert len(whole.encode()) < 2_000_000
    assert "more are in subcomponents.json, for which this page has no room" in whole
    assert LARGEST + LARGEST_EXAMPLES < 2_000_000


@pytest.mark.parametrize(
    ("token", "seen"),
    [(" a\n", " a↵"), ("\t\t", "→→"), ("\x00\u202e", "��"), ("x" * 50, "x" * 39 + "…"), ("é模", "é模")],
)
def test_tokens_that_cannot_be_seen_are_made_visible(token: str, seen: str) -> None:
    assert shown(token) == seen
