"""Two processes that share an evaluation of a padded text find what one finds: numbers, counts, contexts."""

import dataclasses
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from tests.language import BigramSpec, Tokens

from spd_hydra import distributed
from spd_hydra.build import assemble, untrained_target
from spd_hydra.composition import compose
from spd_hydra.decomposition.config import SitePattern
from spd_hydra.loss.divergence import Divergence

COUNTS = ("alive/", "alive_group/")
MEASURED = {"ce/ci", "kl/rounded_0.5", "kl_subset/reads", "pgd/2", "l0_group/writes"}
ROWS = 7  # of which one rank has four, the other three


def evaluated() -> dict[str, Any]:
    """An evaluation of a language model with weights from a seed: its numbers, counts and contexts."""
    config = compose(
        [
            *("debug=smoke", "eval.batches=2", f"eval.batch_size={ROWS}", "eval.ci_threshold=0"),
            *("eval.pgd_steps=[2]", "eval.subcomponents=3", "eval.contexts=4", "ci_fn=global_transformer"),
            *("ci_fn.d_model=8", "ci_fn.d_mlp=8", "ci_fn.n_heads=2", "ci_fn.n_layers=1"),
            "loss.hidden_acts_recon.coeff=1",
        ]
    )
    sites = {"reads": SitePattern(pattern="embed", C=14), "writes": SitePattern(pattern="unembed", C=9)}
    decomposition = dataclasses.replace(config.decomposition, sites=sites, tied={})
    loss = dataclasses.replace(config.loss, divergence=Divergence.kl)
    config = dataclasses.replace(
        config, model=BigramSpec(), data=Tokens(), decomposition=decomposition, loss=loss
    )
    parts = assemble(config, untrained_target(config), torch.device("cpu"))
    found = parts.evaluate(20, certified=True, last=True)
    assert found.text is not None
    return {
        "metrics": found.metrics,
        "positions": found.n_positions,
        "density": {site: own.density.tolist() for site, own in found.sites.items()},
        "text": dataclasses.asdict(found.text),
    }


def of_a_rank(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with distributed.process_group(torch.device("cpu")):
        torch.save(evaluated(), out / f"{rank}.pt")


@pytest.mark.slow
def test_two_ranks_measure_a_padded_text_as_one_process_does(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(of_a_rank, (port, tmp_path), nprocs=2)  # type: ignore[attr-defined]
    one = evaluated()
    padding = 2 * (ROWS // 2)  # the last token of every other row of two batches
    assert one["positions"] == 2 * ROWS * 9 - padding
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["positions"] == one["positions"]
        assert found["density"] == one["density"]
        assert found["metrics"].keys() == one["metrics"].keys()
        assert found["metrics"].keys() >= MEASURED
        for name, value in one["metrics"].items():
            if name.startswith(COUNTS):
                assert found["metrics"][name] == value, name
            elif name.startswith("ce_recovered/"):  # a difference of near numbers over another one
                assert found["metrics"][name] == pytest.approx(value, abs=1e-5), name
            else:
                assert found["metrics"][name] == pytest.approx(value, rel=1e-5), name
        assert found["text"]["positions"] == one["text"]["positions"] == one["positions"]
        assert found["text"]["sites"].keys() == one["text"]["sites"].keys()
        for site, wanted in one["text"]["sites"].items():
            assert len(wanted) == 3
            for own, expected in zip(found["text"]["sites"][site], wanted, strict=True):
                assert own.pop("mean_ci") == pytest.approx(expected["mean_ci"], rel=1e-5)
                assert own == {key: value for key, value in expected.items() if key != "mean_ci"}
    first = torch.load(tmp_path / "0.pt")["text"]["examples"]
    assert len(first) == 4
    assert first == one["text"]["examples"]
