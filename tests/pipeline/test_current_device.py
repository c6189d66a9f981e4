"""The run's CUDA device is the current one wherever CUDA is touched, on a make-believe CUDA."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dump_activations import StepsDataset
from dump_activations.pipeline import board_feed, transfer
from dump_activations.pipeline.device import current
from dump_activations.timing import Stopwatch

DEVICE = torch.device("cuda:1")


class MakeBelieve:
    """Notes which device was current, in which thread, at each call that needs one.

    Like CUDA's own, a thread's current device is the first one until it chooses another.
    """

    def __init__(self):
        self.touched = []
        self._local = threading.local()

    def touch(self, *_, **__):
        self.touched.append((threading.current_thread().name, getattr(self._local, "device", 0)))
        return True

    def device(self, device):
        return _Current(self._local, device.index)

    def event(self, **_):
        names = ("record", "query", "synchronize", "elapsed_time")
        return SimpleNamespace(**dict.fromkeys(names, self.touch))

    def stream(self, *_):
        return SimpleNamespace(wait_event=self.touch, wait_stream=self.touch)


class _Current:
    def __init__(self, local, device):
        self._local, self._device = local, device

    def __enter__(self):
        self._before = getattr(self._local, "device", 0)
        self._local.device = self._device

    def __exit__(self, *_):
        self._local.device = self._before


@pytest.fixture
def cuda(monkeypatch):
    cuda = MakeBelieve()
    fake = SimpleNamespace(
        device=cuda.device,
        Event=cuda.event,
        Stream=cuda.stream,
        current_stream=cuda.stream,
        stream=lambda _: nullcontext(),
        synchronize=cuda.touch,
    )
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(transfer, "_allocate", lambda *_, **__: cuda.touch() and {})
    return cuda


def test_the_reader(cuda, demo_pool, monkeypatch):
    def allocate(shape, dtype):
        cuda.touch()
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(board_feed, "empty_pinned", allocate)
    indices = np.arange(9)
    feed = board_feed.feed_boards(
        StepsDataset(demo_pool),
        indices,
        batch_size=4,
        vocabulary=99,
        device=DEVICE,
        reading=Stopwatch(),
        waiting=Stopwatch(),
    )
    assert [len(batch.indices) for batch in feed] == [4, 4, 1]
    assert set(cuda.touched) == {("boards_0", 1)}


def test_whoever_waits_for_a_copy(cuda):
    with current(DEVICE):
        copies = transfer.CudaTransfer({}, torch.float32, DEVICE, keep=True)
        batch = copies.capture(4).send(None, [])
    writer = threading.Thread(target=batch.chunks[0].wait, name="writer")
    cuda.touched.clear()
    writer.start()
    writer.join()
    assert cuda.touched == [("writer", 1)]
