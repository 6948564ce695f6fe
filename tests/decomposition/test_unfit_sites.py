"""What is told of sites that no mask could stand for, and how to choose the others."""

import pytest
from tests.decomposition.test_sites import nested, patterns

from spd_hydra.decomposition.sites import find_sites, unfit_sites


def in_blocks(*names: str) -> list[str]:
    return [f"{head}.{block}.{name}" for block in (0, 1) for head, name in (one.split("/") for one in names)]


@pytest.mark.parametrize(
    ("sites", "others", "unfit", "advised"),
    [
        # those of another part of the model
        (
            in_blocks("text.layers/q", "text.layers/fc", "vision.layers/q"),
            ["text.embed"],
            ["vision.layers.0.q", "vision.layers.1.q"],
            {"layers": "text.layers.*"},
        ),
        # one of a block, and with it the same one of every block; a part of the block that has none is whole
        (
            in_blocks("h/attn.q", "h/attn.k", "h/attn.out", "h/mlp.up", "h/mlp.down"),
            ["head"],
            ["h.0.attn.k"],
            {"q": "h.*.attn.q", "out": "h.*.attn.out", "mlp": "h.*.mlp.*"},
        ),
        # what the user did not ask for is not advised
        (in_blocks("h/q", "h/k"), in_blocks("h/v"), ["h.0.k"], {"q": "h.*.q"}),
        # two entries of one name
        (
            in_blocks("a/out.fc", "b/out.fc", "a/q", "b/q"),
            [],
            ["a.0.q", "b.0.q"],
            {"out": "a.*.out.*", "out_2": "b.*.out.*"},
        ),
        # no blocks
        (["one.fc", "one.out", "two"], [], ["two"], {"one": "one.*"}),
        # nothing would be left of blocks that are not alike
        (["layers.0", "layers.1"], [], ["layers.1"], {"0": "layers.0"}),
    ],
)
def test_sites_that_cannot_be_masked_are_told_with_entries_that_match_exactly_the_others(
    sites: list[str], others: list[str], unfit: list[str], advised: dict[str, str]
) -> None:
    target = nested(*sites, *others)
    words = [f"'decomposition.sites.{name}.pattern={pattern}'" for name, pattern in advised.items()]
    assert str(unfit_sites("which is odd", unfit, target, sites)) == (
        f"decomposition.sites: got {', '.join(unfit)}, which is odd; decompose the others alone: "
        f"{' '.join(words)}"
    )
    found = find_sites(target, patterns(**{name: (pattern, 2) for name, pattern in advised.items()}))
    assert set(found) <= set(sites) - set(unfit)


def test_where_every_site_cannot_be_masked_the_other_matrices_of_the_target_are_named() -> None:
    sites = [f"h.0.{name}" for name in "abcd"]
    assert str(unfit_sites("which is odd", sites, nested(*sites, "wte", "head"), sites)) == (
        "decomposition.sites: got h.0.a, h.0.b, h.0.c, … (4 in all), which is odd; choose others with "
        "decomposition.sites.<name>.pattern, of wte, head"
    )


def test_an_identity_that_cannot_be_masked_is_told_by_itself() -> None:
    assert str(unfit_sites("which is odd", ["h.0.identity"], nested("h.0.a"), ["h.0.a"])) == (
        "decomposition.identities: got h.0.identity, which is odd; leave it out"
    )
