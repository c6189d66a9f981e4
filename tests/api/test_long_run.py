"""Memory, open files and threads over thousands of batches."""

import gc
import resource
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dump_activations import demo, dump, load_encoder, stream
from dump_activations.storage.writing import journal
from reference.checkpoints import BASE, config_json, random_state_dict, save_checkpoint

BATCHES = 5_000
OPTIONS = {
    "outputs": ["pooled"],
    "indices": np.arange(BATCHES),
    "batch_size": 1,
    "device": "cpu",
    "allow_cpu": True,
}
# Bytes that the resident size may vary by: less than 1 kB for each batch.
DRIFT = 4 << 20


class Gauge:
    """Measures this process every few hundred batches."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.descriptors: list[int] = []
        self.threads: list[int] = []

    def measure(self, done: int) -> None:
        if done % 500:
            return
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.sizes.append(pages * resource.getpagesize())
        self.descriptors.append(len(list(Path("/proc/self/fd").iterdir())))
        self.threads.append(threading.active_count())

    def check(self) -> None:
        assert len(self.sizes) == BATCHES // 500
        # The first tenth fills caches and starts what is started once.
        sizes, descriptors, threads = self.sizes[2:], self.descriptors[2:-1], self.threads[2:-1]
        assert max(sizes) - sizes[0] < DRIFT, sizes
        assert len(set(descriptors)) == 1, self.descriptors
        assert max(threads) == threads[0], self.threads


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = replace(BASE, layers=1)
    directory = tmp_path_factory.mktemp("checkpoint")
    save_checkpoint(directory, random_state_dict(config), config_json(config))
    return load_encoder(directory)


def test_dump(model, tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "SYNC_INTERVAL", 0.01)
    gauge = Gauge()
    path = tmp_path / "a.safetensors"
    dump(model, demo.DATASET, path, progress=lambda done, _: gauge.measure(done), **OPTIONS)
    gauge.check()


def test_stream(model):
    gauge = Gauge()
    for batch in stream(model, demo.DATASET, **OPTIONS):
        gauge.measure(batch.first_row + 1)
    gauge.check()
