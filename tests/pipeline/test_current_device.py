"""The run's CUDA device is the current one wherever CUDA is touched, on a make-believe CUDA."""

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dump_activations.pipeline import transfer
from dump_activations.pipeline.board_feed import BoardBatch
from dump_activations.pipeline.device import current
from dump_activations.pipeline.pinned import PinnedSlots

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
    monkeypatch.setattr(transfer._DeviceSlot, "bring", lambda *_: cuda.touch())
    return cuda


@pytest.fixture
def host_slots(cuda, monkeypatch):
    def registered(*_):
        cuda.touch()
        return 0

    runtime = SimpleNamespace(cudaHostRegister=registered, cudaHostUnregister=registered)
    torch.cuda.cudart = lambda: runtime
    return PinnedSlots({"pooled": (4, 8)}, torch.float32, DEVICE, count=2)


def test_whoever_pins_memory(cuda, host_slots):
    with host_slots:
        assert len([*host_slots]) == 2
    assert cuda.touched == [("pinning_0", 1), ("MainThread", 1)]


def test_whoever_waits_for_a_copy(cuda, host_slots):
    boards = BoardBatch(0, np.arange(4), torch.zeros((4, 16), dtype=torch.uint8), {})
    with host_slots, current(DEVICE):
        copies = transfer.CudaTransfer({}, torch.float32, DEVICE, host_slots=host_slots)
        batch = copies.capture(boards).send([])
    writer = threading.Thread(target=batch.chunks[0].wait, name="writer")
    cuda.touched.clear()
    writer.start()
    writer.join()
    assert cuda.touched == [("writer", 1)]
