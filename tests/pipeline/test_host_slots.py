"""Host slots of a GPU's run: how many, how they are pinned, and that they are given back."""

import mmap
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from simulated.checks import in_other_words, one_thread
from simulated.memory import PinnedMemory
from simulated.policies import lazy
from simulated_device import simulated

from dump_activations import DumpActivationsNote, dump, stream
from dump_activations.errors import DeviceError, InvalidArgumentError
from dump_activations.pipeline import cuda
from dump_activations.pipeline.cuda import CudaTransfer
from reference.dumps import read_dump

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("disk_takes_no_time")

OPTIONS = {"outputs": ["layer_outputs", "pooled"], "n_samples": 50, "batch_size": 8}
# Bytes of a batch of the demo's: 4 layers, 64 wide, in fp32; each tensor of a slot is whole pages.
SLOT = 8 * 4 * 16 * 64 * 4 + mmap.PAGESIZE


def flags_of(address):
    """Return the kernel's flags of mapped memory; `dc` is for what a child does not get."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(span[1], 16) <= address < int(span[2], 16)
        elif is_there and line.startswith("VmFlags: "):
            return line.split()[1:]
    raise AssertionError(f"{address:x} is not mapped")


class Watched(PinnedMemory):
    """Page-locked memory that remembers what was registered, and may refuse it."""

    def __init__(self, refusal=0, refuses_torch=False):
        super().__init__()
        self.sizes = []
        self.refusal, self.refuses_torch = refusal, refuses_torch

    def register(self, address, nbytes):
        self.sizes.append(nbytes)
        assert "dc" in flags_of(address), "a forked child would take pages from the device"
        return self.refusal or super().register(address, nbytes)

    def allocate(self, shape, dtype):
        if self.refuses_torch:
            raise RuntimeError("CUDA error: operation not supported")
        return super().allocate(shape, dtype)


@pytest.fixture
def memory(monkeypatch, request):
    """Return watched memory, of which a process may lock as much as a parameter says."""
    if hasattr(request, "param"):
        monkeypatch.setattr(cuda, "pinned_share", lambda _: request.param)
    return Watched()


@pytest.fixture
def ways(demo_checkpoint, demo_dataset, tmp_path):
    """Return ways of a run to end, and how many slots each has."""

    streamed = partial(stream, demo_checkpoint, demo_dataset, **OPTIONS)
    dumped = partial(dump, demo_checkpoint, demo_dataset, tmp_path / "a.pt", **OPTIONS)

    def failing(error, run, **options):
        with pytest.raises(error):
            run(**options)

    return {
        "dump": (dumped, 3),
        "no write": (lambda: dumped(write=False), 0),
        "only weights": (
            lambda: [*stream(demo_checkpoint, demo_dataset, outputs="rmsnorm_gammas")],
            0,
        ),
        "copy": (lambda: [*streamed()], 2),
        "view": (lambda: [*streamed(tensors="view")], 2),
        "device": (lambda: [*streamed(tensors="device")], 0),
        "failing": (partial(failing, ZeroDivisionError, dumped, progress=lambda *_: 1 / 0), 3),
        "failing before": (partial(failing, InvalidArgumentError, streamed, labels="none"), 0),
        "broken off": (lambda: next(streamed(tensors="view")), 2),
        "never begun": (streamed, 2),
    }


WAYS = [
    *("dump", "no write", "only weights", "copy", "view", "device"),
    *("failing", "failing before", "broken off", "never begun"),
]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_takes_what_it_needs_and_gives_it_back(way, ways, memory):
    run, slots = ways[way]
    with simulated(lazy, memory) as device:
        run()
        device.synchronize()
    assert memory.sizes == ([slots * SLOT] if slots else [])
    assert not memory.registered


@pytest.mark.parametrize("waits", [True, False])
def test_memory_is_given_back_after_copies_in_streams_of_the_callers(
    waits, demo_checkpoint, demo_dataset, monkeypatch
):
    wait = "torch.cuda.synchronize(self._device)"
    in_other_words(CudaTransfer, "close", (wait, wait if waits else "pass"))(monkeypatch)
    with simulated(lazy) as device:
        batches = stream(demo_checkpoint, demo_dataset, tensors="view", **OPTIONS)
        batch = next(batches)
        with torch.cuda.stream(torch.cuda.Stream()):
            copy = batch["pooled"].to("cuda:0", non_blocking=True)
        batches.close()
        if waits:
            assert torch.equal(copy.cpu(), batch["pooled"])
        else:
            with pytest.raises(AssertionError, match="unregistered before its copy"):
                device.synchronize()


@pytest.mark.parametrize("memory", [3 * SLOT - 1], indirect=True)
def test_a_small_share_makes_for_fewer_slots(ways, memory, tmp_path):
    with simulated(lazy, memory):
        ways["dump"][0]()
    assert memory.sizes == [2 * SLOT]
    assert len(read_dump(tmp_path / "a.pt").tensors["pooled"]) == 50


@pytest.mark.parametrize("memory", [2 * SLOT - 1], indirect=True)
def test_a_share_without_room_is_an_error_before_any_file(ways, memory, tmp_path):
    text = r"host memory \(2 x .* must be page-locked, this process may .*batch_size=8; .*=4$"
    with simulated(lazy, memory):
        for way in ("dump", "copy", "never begun"):
            with pytest.raises(DeviceError, match=text):
                ways[way][0]()
    assert not memory.sizes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("always::dump_activations.DumpActivationsNote")
@pytest.mark.parametrize("refuses_torch", [False, True])
def test_where_memory_cannot_be_registered(refuses_torch, ways, tmp_path, recwarn):
    with simulated(lazy, Watched()):
        ways["dump"][0]()
    expected = read_dump(tmp_path / "a.pt").tensors
    (tmp_path / "a.pt").unlink()
    recwarn.clear()
    with simulated(lazy, Watched(801, refuses_torch)):
        ways["dump"][0]()
    found = read_dump(tmp_path / "a.pt").tensors
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    notes = [str(each.message) for each in recwarn if each.category is DumpActivationsNote]
    assert any("cuda:0 cannot page-lock host memory" in note for note in notes) == refuses_torch


@pytest.mark.parametrize(
    ("options", "rows"),
    [({"n_samples": 5}, 5), ({"indices": torch.arange(3)}, 3), ({"steps": "10:40:5"}, 6)],
)
def test_no_more_than_the_boards_need(options, rows, demo_checkpoint, demo_dataset, memory):
    options = OPTIONS | {"outputs": "layer_outputs"} | options
    with simulated(lazy, memory):
        [*stream(demo_checkpoint, demo_dataset, **options)]
    assert memory.sizes == [2 * (SLOT - mmap.PAGESIZE) // 8 * rows]


@pytest.mark.parametrize("write", [True, False])
def test_the_time_of_every_batch_is_counted_but_the_first_ones_not(write, ways):
    """An interval takes a millisecond on the simulated device."""
    with simulated(lazy):
        summary = ways["dump"][0](write=write)
    assert summary.stage_seconds["forward"] == pytest.approx(7e-3)
    assert summary.stage_seconds["copy"] == pytest.approx(7e-3 if write else 0)
