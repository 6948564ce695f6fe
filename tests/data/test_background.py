"""A data source that loads in worker processes: signals for the run do not kill its workers."""

import signal
from pathlib import Path

import pytest
from tests.ranks import begin, directory_in, ends, result_in, status_of

from spd_hydra.stop import kept_from_children

# Sparse features that the workers of torch's DataLoader draw, each batch when it is asked for.
SOURCE = """
import dataclasses
from collections import deque
import torch
from torch.utils.data import DataLoader, Dataset
from spd_hydra import rng
from spd_hydra.data.base import Batches, DataSource
from spd_hydra.section import option, register
from spd_hydra.stop import kept_from_children

class Drawn(Dataset):
    def __init__(self, n_features):
        self.n_features = n_features
    def __getitem__(self, request):
        if request is None:
            return None
        key, rows = request
        draws = rng.uniform(key, rows, torch.arange(2 * self.n_features, dtype=torch.int32))
        return draws[:, : self.n_features] * (draws[:, self.n_features :] < 0.1)

class Requests:
    def __init__(self):
        self.waiting = deque()
    def __iter__(self):
        while True:
            yield self.waiting.popleft() if self.waiting else None

class BackgroundBatches(Batches):
    def __init__(self, n_features, workers, method):
        self.requests, self.drawn = Requests(), Drawn(n_features)
        self.workers, self.method, self.batches = workers, method, None
    def __call__(self, key, rows):
        if not self.workers:
            return self.drawn[key, rows]
        if self.batches is None:
            with kept_from_children():
                self.batches = iter(DataLoader(
                    self.drawn, sampler=self.requests, batch_size=None, num_workers=self.workers,
                    multiprocessing_context=self.method, prefetch_factor=1,
                ))
        self.requests.waiting.append((key, rows))
        return next(batch for batch in self.batches if batch is not None)

@register("data", "background")
@dataclasses.dataclass(kw_only=True)
class Background(DataSource):
    workers: int = option(0, "worker processes", ge=0)
    method: str = option("fork", "how they start")
    def bind(self, target):
        return BackgroundBatches(target.n_features, self.workers, self.method)
"""
# To the whole process group, as a scheduler and a terminal do.
DISTURB = """
import background
{}
"""
SIGNAL = """
take_step = Trainer.train_step
def disturbed_step(self):
    if self.step == 5:
        os.killpg(0, signal.SIGUSR2)
    return take_step(self)
Trainer.train_step = disturbed_step
"""


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "method"), [(0, "fork"), (2, "fork"), (2, "spawn")])
def test_a_signal_to_all_processes_saves_within_a_step_and_the_run_goes_on_to_the_same_bits(
    tmp_path: Path, target_cache: Path, workers: int, method: str
) -> None:
    (tmp_path / "background.py").write_text(SOURCE)
    words = [
        "debug=smoke",
        f"cache_dir={target_cache}",
        "data=background_schema",
        "train.checkpoint_every=20",
    ]
    results = {}
    for name, disturb in (("undisturbed", ""), ("stopped", SIGNAL)):
        folder = tmp_path / name
        folder.mkdir()
        used = workers if disturb else 0
        own = [*words, f"data.workers={used}", f"data.method={method}"]
        place = {"size": 1, "own_session": True, "PYTHONPATH": str(tmp_path)}
        (done,) = ends(begin(folder, own, disturb=DISTURB.format(disturb), **place))
        if disturb:
            assert done.code == 143, done.err
            status = status_of(directory_in(folder))
            assert (status["status"], status["step"]) == ("stopped", 6)
            resume = [f"resume={directory_in(folder)}"]
            (done,) = ends(begin(folder, resume, disturb=DISTURB.format(""), **place))
        assert done.code == 0, done.err
        results[name] = result_in(folder)
    for result in results.values():
        del result["summary"]["target"]  # it is not cached
    assert results["stopped"] == results["undisturbed"]


def test_the_mask_of_signals_is_put_back() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with kept_from_children():
        held = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        assert {signal.SIGINT, signal.SIGUSR2} <= held
        assert signal.SIGTERM not in held
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before
