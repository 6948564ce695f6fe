"""Which sites are roots, found by disturbing outputs and, without values, by gradients."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.decomposition.roots import find_roots, require_values_that_stay, roots_without_values
from spd_hydra.section import ConfigError


def roots_seen(model: DecomposedModel, batch: Tensor) -> frozenset[str]:
    return find_roots(model, batch, model.clean_pass(batch))


FIND: list[Callable[[DecomposedModel, Tensor], frozenset[str]]] = [roots_seen, roots_without_values]


class Net(nn.Module):
    """An embedding, two matrices that read it, and one that reads their sum and a skip past them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.left, self.right, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        last: Tensor = self.last(x + torch.tanh(self.left(x)) + self.right(x) ** 2)
        return last


def roots(find: Callable[[DecomposedModel, Tensor], frozenset[str]], *names: str) -> frozenset[str]:
    torch.manual_seed(0)
    sites = {name: SitePattern(pattern=name, C=3) for name in names}
    model = DecomposedModel(Net(), Decomposition(sites=sites), MLPCausalImportance(hidden=4), seed=0)
    found = find(model, torch.arange(6))
    assert not any(parameter.grad is not None for parameter in model.parameters())
    return found


@pytest.mark.parametrize("find", FIND)
def test_a_site_is_a_root_if_no_other_site_feeds_it(
    find: Callable[[DecomposedModel, Tensor], frozenset[str]],
) -> None:
    assert roots(find, "embed", "left", "right", "last") == {"embed"}
    assert roots(find, "left", "right", "last") == {"left", "right"}
    assert roots(find, "right", "last") == {"right"}


@pytest.mark.parametrize("find", FIND)
def test_a_site_fed_by_layers_that_are_not_decomposed_is_a_root(
    find: Callable[[DecomposedModel, Tensor], frozenset[str]],
) -> None:
    assert roots(find, "last") == {"last"}
    assert roots(find, "left") == {"left"}


class Clipping(nn.Module):
    """Changes a view of one layer's output in place, and a copy of the other's."""

    def __init__(self) -> None:
        super().__init__()
        self.clipped, self.kept = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.clipped(x)
        y.view(-1).clamp_(-0.1, 0.1)
        z: Tensor = self.kept(y).clone().clamp_(-0.1, 0.1)
        return z


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_site_whose_output_is_changed_in_place_is_refused_with_the_others_as_advice(device: str) -> None:
    sites = {name: SitePattern(pattern=name, C=3) for name in ("clipped", "kept")}
    ci_fn = MLPCausalImportance(hidden=4)
    model = DecomposedModel(Clipping(), Decomposition(sites=sites), ci_fn, seed=0).to(device)
    with pytest.raises(ConfigError) as caught:
        require_values_that_stay(model, torch.ones(2, 4, device=device))
    message = str(caught.value)
    assert message.startswith("decomposition.sites: got clipped, whose output the target changes in place; ")
    assert "pattern=kept" in message
    alone = Decomposition(sites={"kept": sites["kept"]})
    require_values_that_stay(DecomposedModel(Clipping(), alone, ci_fn, seed=0), torch.ones(2, 4))


class AddsInPlace(nn.Module):
    """Adds to what a layer read, after it was read, or to its batch."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.fc1, self.fc2 = what, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.what == "batch":
            x += 1
        h = torch.tanh(x)
        added = self.fc2(torch.relu(self.fc1(h)))
        h += added
        return h


def adding(what: str, device: str) -> DecomposedModel:
    sites = {"fc1": SitePattern(pattern="fc1", C=3)}
    return DecomposedModel(
        AddsInPlace(what), Decomposition(sites=sites), MLPCausalImportance(hidden=4), seed=0
    ).to(device)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_site_whose_input_is_changed_after_it_was_read_is_refused(device: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_values_that_stay(adding("input", device), torch.ones(2, 4, device=device))
    assert str(caught.value).startswith(
        "decomposition.sites: got fc1, whose input the target changes in place; "
    )


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_target_that_changes_its_batch_is_refused(device: str) -> None:
    with pytest.raises(ConfigError) as caught:
        require_values_that_stay(adding("batch", device), torch.ones(2, 4, device=device))
    assert str(caught.value) == (
        "model: the target changes its batch in place (x += …, x[…] = …), and every pass would change it "
        "again; let its forward make a new tensor (x = x + …)"
    )
