"""Decomposed models are copied, pickled and saved whole."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.decomposition.test_decomposed_model import CASES, batch_of, make
from tests.model.tiny_hf import saved_model, tokens

from spd_hydra.ci_fn.mlp import MLPCausalImportance
from spd_hydra.decomposition.compiled_blocks import CompiledBlocks
from spd_hydra.decomposition.config import Decomposition, SitePattern
from spd_hydra.decomposition.decomposed_model import DecomposedModel
from spd_hydra.model.tokens_in import adapt


def saved_whole(model: DecomposedModel) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


WAYS: list[Callable[[DecomposedModel], Any]] = [
    copy.deepcopy,
    lambda model: pickle.loads(pickle.dumps(model)),  # noqa: S301, its own
    saved_whole,
]


def assert_alike(found: DecomposedModel, model: DecomposedModel, batch: torch.Tensor) -> None:
    taken = {model.site_names[0]: [0, 2], model.site_names[-1]: 1}
    assert torch.equal(found(batch), model(batch))
    assert torch.equal(found.ablated(batch, taken), model.ablated(batch, taken))
    for site, ci in model.causal_importances(batch).items():
        assert torch.equal(found.causal_importances(batch)[site].z, ci.z)


@pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("case", CASES)
def test_a_copied_model_computes_the_same_and_shares_nothing(
    case: str, way: Callable[[DecomposedModel], Any]
) -> None:
    model, batch = make(case), batch_of(case)
    model.compiled_blocks = CompiledBlocks()
    found = way(model)
    assert_alike(found, model, batch)
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in found.state_dict().values()}
    own = {id(one) for one in [*found.target.parameters(), *found.target.buffers()]}
    copied = found.patched.module
    assert {id(one) for one in [*copied.parameters(), *copied.buffers()]} == own


def test_a_model_of_transformers_is_read_by_another_process(tmp_path: Path) -> None:
    target = adapt(saved_model("gpt2", tmp_path), "logits")
    sites = {"a": SitePattern(pattern="transformer.h.*.mlp.c_fc", C=5)}
    model = DecomposedModel(target, Decomposition(sites=sites), MLPCausalImportance(hidden=2), seed=0)
    model.eval()
    for way in WAYS:
        assert_alike(way(model), model, tokens())
    torch.save((model, tokens()), tmp_path / "model.pt")
    program = (
        "import sys, torch; model, batch = torch.load(sys.argv[1], weights_only=False); "
        "torch.save(model(batch), sys.argv[2])"
    )
    paths = [str(tmp_path / name) for name in ("model.pt", "output.pt")]
    subprocess.run([sys.executable, "-c", program, *paths], check=True)
    assert torch.equal(torch.load(paths[1]), model(tokens()))
