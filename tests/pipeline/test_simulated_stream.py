"""`stream` on a simulated device: what is lent holds until the next batch, in whichever streams.

The caller's work on a batch is queued, in another stream for every other batch, and the run is in a
third: only waits on the device keep them apart. As in `test_simulated_device`, each wait is then
taken out. The precision is bf16, whose weights are cast on the device.
"""

from functools import partial

import pytest
import torch
from simulated.checks import KEYS, in_other_words, one_thread, randoms, run_arguments, wrong
from simulated.policies import first, greedy, lazy
from simulated_device import simulated

from dump_activations import stream
from dump_activations.api import streaming
from dump_activations.pipeline import transfer
from dump_activations.pipeline.transfer import CudaTransfer

__all__ = ["one_thread"]

BATCHES, BATCH = 6, 8
N = BATCHES * BATCH - 3
CUDA = torch.device("cuda", 0)

# Numbers of the streams: the run's, the caller's two, and the one that copies to the host.
RUN, ONE, OTHER, SIDE = range(4)
run_first, one_first, other_first, side_first = map(first, (RUN, ONE, OTHER, SIDE))
POLICIES = [
    pytest.param(lazy, id="lazy"),
    pytest.param(greedy, id="greedy"),
    pytest.param(run_first, id="run_first"),
    pytest.param(one_first, id="one_first"),
    pytest.param(side_first, id="side_first"),
    *randoms(6),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return run_arguments(root, n_samples=N, batch_size=BATCH, precision="bf16")


@pytest.fixture(scope="module")
def on_cpu(run, one_thread):
    """Return the tensors of the run on the CPU."""
    batches = [*stream(**run, device="cpu", allow_cpu=True)]
    return {key: torch.cat([batch[key] for batch in batches]) for key in KEYS}


def copied_on_device(tensor):
    """Queue a use of a device tensor."""
    return tensor.clone()


def copied_to_device(tensor):
    """Queue a use of a pinned tensor."""
    return tensor.to(CUDA, non_blocking=True)


def copied_on_host(tensor):
    return tensor.clone()


USES = {
    "device": ("device", copied_on_device),
    "borrowed, to the device": ("borrowed", copied_to_device),
    "borrowed, on the host": ("borrowed", copied_on_host),
    "own": ("own", lambda tensor: tensor),
}


def used(policy, run, how):
    """Return what the caller's copies of all batches hold at last."""
    tensors, use = USES[how]
    with simulated(policy):
        mine = [torch.cuda.Stream(), torch.cuda.Stream()]
        batches = stream(**run, tensors=tensors)
        copies = []
        for i in range(BATCHES):
            with torch.cuda.stream(mine[i % 2]):
                batch = next(batches)
                copies.append({key: use(batch[key]) for key in KEYS})
        assert next(batches, None) is None
        torch.cuda.synchronize()
        return {key: torch.cat([each[key].cpu() for each in copies]) for key in KEYS}


@pytest.mark.parametrize("how", USES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_caller_finds_the_bytes_of_the_cpu(policy, how, run, on_cpu):
    assert not wrong(used(policy, run, how), on_cpu)


in_returned = partial(in_other_words, streaming._Caller, "returned")
in_send = partial(in_other_words, CudaTransfer, "send")

WAIT_FOR_LENT = "self._runs_stream.wait_stream(self._has_lent_in)"
WAIT_FOR_ASKING = "self._runs_stream.wait_stream(torch.cuda.current_stream(self._device))"
RECORD = "source.filled.record()"


def waits(*, for_lent, for_asking):
    return in_returned(
        (WAIT_FOR_LENT, WAIT_FOR_LENT if for_lent else "pass"),
        (WAIT_FOR_ASKING, WAIT_FOR_ASKING if for_asking else "pass"),
    )


def one_device_slot(monkeypatch):
    monkeypatch.setattr(transfer, "_DEVICE_SLOTS", 1)


SLIPS = {
    "a device slot is filled again while the caller uses it": (
        ("device", run_first),
        waits(for_lent=False, for_asking=False),
    ),
    "the stream that asks is waited for, not the one that used": (
        ("device", run_first),
        waits(for_lent=False, for_asking=True),
    ),
    "a host slot is filled again while the caller copies it": (
        ("borrowed, to the device", side_first),
        waits(for_lent=False, for_asking=False),
    ),
    "a host slot is given back at once": (
        ("borrowed, on the host", greedy),
        in_other_words(
            CudaTransfer,
            "_copy",
            ("lambda: ring.give_back(target)", "_nothing"),
            ("whole = Chunk(", "ring.give_back(target); whole = Chunk("),
        ),
    ),
    "a batch is computed in the memory of the one that is lent": (
        ("device", greedy),
        one_device_slot,
    ),
    "the caller does not wait for the forward pass": (
        ("device", one_first),
        in_other_words(
            CudaTransfer,
            "_wait_on_device",
            ("torch.cuda.current_stream(self._device).wait_event(event)", "pass"),
        ),
    ),
    "the forward pass is recorded too early": (
        ("device", one_first),
        lambda monkeypatch: (
            in_send((RECORD, "pass"))(monkeypatch),
            in_other_words(
                CudaTransfer, "capture", ("return _Cuda", "slot.filled.record(); return _Cuda")
            )(monkeypatch),
        ),
    ),
    "the run is in the stream that asks": (
        ("own", one_first),
        in_returned(("torch.cuda.stream(self._runs_stream)", "nullcontext()")),
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_shows_as_wrong_bytes(slip, run, on_cpu, monkeypatch):
    (how, policy), make = SLIPS[slip]
    make(monkeypatch)
    assert wrong(used(policy, run, how), on_cpu)
