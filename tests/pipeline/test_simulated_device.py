"""The GPU's path on a simulated device, under schedulers that are out to break it.

The device may run work early or late: the bytes are the same as on the CPU. Then each wait of the
path is taken out: the program with one slip has to be found out.
"""

import queue
import sys
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from simulated.checks import KEYS, in_other_words, named, one_thread, randoms, run_arguments, wrong
from simulated.memory import PinnedMemory
from simulated.policies import first, greedy, lazy
from simulated.streams import Stream
from simulated_device import simulated

from dump_activations import DeviceError, dump, stream
from dump_activations.model.capture import Capture
from dump_activations.pipeline import cuda, transfer
from dump_activations.pipeline.cuda import CudaTransfer
from dump_activations.storage.writing import writers
from reference.dumps import read_dump

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("disk_takes_no_time")

# More batches than slots, and no more than the writers are handed; the last one is short.
BATCHES, BATCH = 7, 8
N = BATCHES * BATCH - 3

COMPUTE, SIDE = 0, 1  # numbers of the streams
compute_first, side_first = first(COMPUTE), first(SIDE)
EXTREMES = named(lazy=lazy, greedy=greedy, compute_first=compute_first, side_first=side_first)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return run_arguments(tmp_path_factory.mktemp("run"), n_samples=N, batch_size=BATCH)


@pytest.fixture(scope="module")
def on_cpu(run, one_thread, tmp_path_factory):
    """Return the tensors of the run on the CPU."""
    path = tmp_path_factory.mktemp("cpu") / "a.safetensors"
    dump(**run, output=path, device="cpu", allow_cpu=True)
    return read_dump(path).tensors


@pytest.fixture
def simulated_dump(run, tmp_path):
    """Return a function: policy -> the run's tensors, and the names of what the device ran."""

    def dump_under(policy):
        path = tmp_path / "a.safetensors"
        with simulated(policy) as device:
            dump(**run, output=path)
        return read_dump(path).tensors, device.log

    return dump_under


@pytest.fixture
def slow_writers(monkeypatch):
    """Let writers begin only while the program cannot go on without them."""
    waited_for = threading.Event()
    write, join = writers._Submission.work_on, writers.Writers._join

    class Ring(queue.LifoQueue):
        def get(self):
            if self.empty():
                waited_for.set()
            slot = super().get()
            waited_for.clear()
            return slot

    def write_span(*args):
        waited_for.wait()
        write(*args)

    def join_threads(pool):
        waited_for.set()
        join(pool)

    monkeypatch.setattr(transfer, "Ring", Ring)
    monkeypatch.setattr(writers._Submission, "work_on", write_span)
    monkeypatch.setattr(writers.Writers, "_join", join_threads)


def forwards_before_copies(log):
    """Count the forward passes that had begun when each batch's copies to the host did."""
    begun, counts = 0, []
    for name in log:
        begun += name == "aten.embedding.default"
        if begun and name == "copy cuda to cpu":
            counts.append(begun)
    # Two passes run before the loop, of which the first batch is copied to the host.
    return [count - 2 for count in counts[len(KEYS) :: len(KEYS)]]


@pytest.mark.parametrize("policy", [*EXTREMES, *randoms(20)])
@pytest.mark.parametrize("writers", ["slow_writers", "quick"])
def test_writers_get_the_bytes_of_the_cpu(writers, policy, simulated_dump, on_cpu, request):
    if writers == "slow_writers":
        request.getfixturevalue(writers)
    tensors, _ = simulated_dump(policy)
    assert not wrong(tensors, on_cpu)


@pytest.mark.parametrize("policy", [*EXTREMES, *randoms(4)])
def test_a_consumer_that_holds_every_batch_has_the_bytes_of_the_cpu(policy, run, on_cpu):
    with simulated(policy):
        batches = list(stream(**run))
    assert [len(batch.indices) for batch in batches] == [*[BATCH] * (BATCHES - 1), BATCH - 3]
    found = {key: torch.cat([batch[key] for batch in batches]) for key in KEYS}
    found["boards"] = torch.cat([batch.boards for batch in batches])
    found["indices"] = torch.cat([batch.indices for batch in batches])
    assert not wrong(found, on_cpu)


def test_a_device_that_fails_for_good_keeps_what_is_written(run, tmp_path, monkeypatch):
    """It fails in a forward pass, and again when the run waits for it to end."""
    forward, failed = Capture.run, threading.Event()

    def fail(*_):
        if failed.is_set():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def forward_or_fail(self, tokens_BS, buffers):
        if len(tokens_BS) < BATCH:
            failed.set()
        fail()
        forward(self, tokens_BS, buffers)

    monkeypatch.setattr(Capture, "run", forward_or_fail)
    with simulated(greedy) as device:
        monkeypatch.setattr(Stream, "synchronize", fail)
        with pytest.raises(DeviceError, match="CUDA error: an illegal memory access") as it:
            dump(**run, output=tmp_path / "a.safetensors", cuda_graph=False)
        device.synchronize()
    assert any("boards of" in note and "are kept" in note for note in it.value.__notes__)


ORDERS = {
    # As late as may be: a batch is computed when a writer asks for it, and none after it is.
    lazy: [1, 2, 3, 4, 5, 6, 7],
    # As early as may be: while a batch is copied, the next one is computed.
    compute_first: [2, 3, 4, 5, 6, 7, 7],
}


@pytest.mark.usefixtures("slow_writers")
@pytest.mark.parametrize("policy", named(lazy=lazy, compute_first=compute_first))
def test_the_program_waits_for_nothing_but_slots(policy, simulated_dump):
    _, log = simulated_dump(policy)
    assert forwards_before_copies(log) == ORDERS[policy]


def ordinary_memory(of):
    """Return a slip: memory is not page-locked, torch's or what the program registers."""

    def make(monkeypatch):
        if of == "torch":
            monkeypatch.setattr(
                PinnedMemory, "allocate", lambda _, shape, dtype: torch.zeros(shape, dtype=dtype)
            )
        else:
            monkeypatch.setattr(PinnedMemory, "register", lambda *_: 0)
            monkeypatch.setattr(PinnedMemory, "unregister", lambda *_: None)

    return make


in_run = partial(in_other_words, CudaTransfer, "run")
in_copy = partial(in_other_words, CudaTransfer, "_copy")
in_bring = partial(in_other_words, cuda._DeviceSlot, "bring")

WAIT_FOR_FORWARD = "self._side.wait_stream(self._compute)"
CREATION = "arrived = torch.cuda.Event(blocking=True)"
DEVICE_SLOT_COPIED = "source.copied.record(self._side)"
HOST_SLOT_FILLED = "arrived.record(self._side)"
BOARDS_COPIED = "self._boards_copied.record()"
END = "whole = Chunk("


def without(text):
    return text, "pass"


def with_first(text, first):
    return text, f"{first}; {text}"


WRONG_BYTES = {
    "copies do not wait for the forward pass": (side_first, in_copy(without(WAIT_FOR_FORWARD))),
    "copies wait for the wrong stream": (
        side_first,
        in_copy((WAIT_FOR_FORWARD, "self._side.wait_stream(self._side)")),
    ),
    "copies are in the wrong stream": (
        lazy,
        in_copy(("torch.cuda.stream(self._side)", "torch.cuda.stream(torch.cuda.Stream())")),
    ),
    "device slot used again without a wait": (
        compute_first,
        in_run(without("self._compute.wait_event(slot.copied)")),
    ),
    "event of the device slot recorded too early": (
        compute_first,
        in_copy(without(DEVICE_SLOT_COPIED), with_first(CREATION, DEVICE_SLOT_COPIED)),
    ),
    "event of the device slot recorded on the compute stream": (
        compute_first,
        in_copy(
            without(DEVICE_SLOT_COPIED), with_first(END, "source.copied.record(self._compute)")
        ),
    ),
    "event of the host slot recorded too early": (
        lazy,
        in_copy(without(HOST_SLOT_FILLED), (CREATION, f"{CREATION}; {HOST_SLOT_FILLED}")),
    ),
    "event of the host slot recorded on the compute stream": (
        lazy,
        in_copy(without(HOST_SLOT_FILLED), with_first(END, "arrived.record(self._compute)")),
    ),
    "host slot given back at once": (
        greedy,
        in_copy(
            ("partial(self._free.put, target)", "int"), with_first(END, "self._free.put(target)")
        ),
    ),
    "writers do not wait": (lazy, in_copy((", partial(self._wait, arrived)", ""))),
    "pinned boards used again while they are copied": (
        lazy,
        in_bring(without("self._boards_copied.synchronize()")),
    ),
    "event of the pinned boards recorded too early": (
        lazy,
        in_bring(without(BOARDS_COPIED), with_first("tokens_BS.copy_", BOARDS_COPIED)),
    ),
    "device memory let go of while it is copied": (
        compute_first,
        in_copy(
            ("in cut(source.buffers, rows).items()", "in clones.items()"),
            with_first(
                CREATION, "clones = {k: t[:rows].clone() for k, t in source.buffers.items()}"
            ),
        ),
    ),
}

WRONG_ORDER = {
    "copies are in the compute stream": (
        compute_first,
        in_other_words(CudaTransfer, "__init__", ("torch.cuda.Stream(device)", "self._compute")),
    ),
    "copies are waited for": (
        compute_first,
        in_copy(("non_blocking=is_queued", "non_blocking=False")),
    ),
    "one device slot": (
        compute_first,
        lambda monkeypatch: monkeypatch.setattr(cuda, "_DEVICE_SLOTS", 1),
    ),
    "host slots are not pinned": (compute_first, ordinary_memory("registered")),
    "boards are not pinned": (lazy, ordinary_memory("torch")),
}


@pytest.mark.filterwarnings("ignore::dump_activations.DumpActivationsWarning")  # 0xFF.. is NaN
@pytest.mark.usefixtures("slow_writers")
@pytest.mark.parametrize("slip", WRONG_BYTES)
def test_a_slip_shows_as_wrong_bytes(slip, simulated_dump, on_cpu, monkeypatch):
    policy, make = WRONG_BYTES[slip]
    make(monkeypatch)
    tensors, _ = simulated_dump(policy)
    assert wrong(tensors, on_cpu) >= set(KEYS)


@pytest.mark.usefixtures("slow_writers")
@pytest.mark.parametrize("slip", WRONG_ORDER)
def test_a_slip_shows_as_a_lost_overlap(slip, simulated_dump, on_cpu, monkeypatch):
    policy, make = WRONG_ORDER[slip]
    make(monkeypatch)
    tensors, log = simulated_dump(policy)
    assert not wrong(tensors, on_cpu)
    assert forwards_before_copies(log) != ORDERS[policy]


@pytest.mark.parametrize("where", ["_lock", "_wait"], ids=["pinning", "writers"])
def test_a_thread_that_does_not_name_the_device_is_found_out(where, simulated_dump, monkeypatch):
    real = cuda.current

    def current(device):
        caller = sys._getframe(1).f_code.co_name
        return nullcontext() if caller == where else real(device)

    monkeypatch.setattr(cuda, "current", current)
    with pytest.raises(AssertionError, match="not named"):
        simulated_dump(lazy)
