"""`stream` on a simulated device: views hold until the next batch, in any streams.

The caller's work on a batch is queued, in another stream for every other batch, and the run is in a
third: only waits on the device keep them apart. As in `test_simulated_device`, each wait is then
taken out. The precision is bf16, whose weights are cast on the device.
"""

import sys
import threading
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from simulated.checks import KEYS, in_other_words, named, one_thread, randoms, run_arguments, wrong
from simulated.policies import first, greedy, lazy
from simulated_device import simulated

from dump_activations import DumpActivationsNote, load_encoder, stream
from dump_activations.api.stream import _Caller
from dump_activations.model.capture import Capture
from dump_activations.model.encoder import DotProduct
from dump_activations.pipeline import cuda
from dump_activations.pipeline.cuda import CudaTransfer
from dump_activations.pipeline.run import Run
from reference.checkpoints import VARIANTS

__all__ = ["one_thread"]
pytestmark = pytest.mark.filterwarnings("always::dump_activations.DumpActivationsNote")

BATCHES, BATCH = 6, 8
N = BATCHES * BATCH - 3
CUDA = torch.device("cuda", 0)

# Numbers of the streams: the run's, the caller's two, and the one that copies to the host.
RUN, ONE, OTHER, SIDE = range(4)
run_first, one_first, other_first, side_first = map(first, (RUN, ONE, OTHER, SIDE))
POLICIES = [
    *named(lazy=lazy, greedy=greedy),
    *named(run_first=run_first, one_first=one_first, side_first=side_first),
    *randoms(6),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    return run_arguments(root, n_samples=N, batch_size=BATCH, precision="bf16")


@pytest.fixture(scope="module")
def on_cpu(run, one_thread):
    """Return the tensors of the run on the CPU."""
    return joined(stream(**run, device="cpu", allow_cpu=True))


def joined(batches):
    batches = [*batches]
    return {key: torch.cat([batch[key].cpu() for batch in batches]) for key in KEYS}


# How batches are asked for, and a use of their tensors. The device queues it.
USES = {
    "device": ("device", torch.clone),
    "view, to the device": ("view", lambda tensor: tensor.to(CUDA, non_blocking=True)),
    "view, on the host": ("view", torch.clone),
    "copy": ("copy", lambda tensor: tensor),
}


def used(policy, run, how, *, later=False, left_after=None):
    """Return the caller's copies of all batches.

    Each batch is asked for in another stream of the caller's, and copied there; or `later`, in the
    stream that asks for the next one. The caller leaves after the first `left_after` batches.
    """
    tensors, use = USES[how]
    with simulated(policy):
        mine = [torch.cuda.Stream(), torch.cuda.Stream()]
        batches = stream(**run, tensors=tensors)
        copies = []
        for i in range(left_after or BATCHES):
            asking, other = mine[i % 2], mine[(i + 1) % 2]
            with torch.cuda.stream(asking):
                batch = next(batches)
                assert torch.cuda.current_stream() is asking
            if later:
                other.wait_stream(asking)
            with torch.cuda.stream(other if later else asking):
                copies.append({key: use(batch[key]) for key in KEYS})
            del batch
        if left_after:
            batches.close()
        else:
            with torch.cuda.stream(other):
                assert next(batches, None) is None
        torch.cuda.synchronize()
        return {key: torch.cat([each[key].cpu() for each in copies]) for key in KEYS}


@pytest.mark.parametrize("how", USES)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_caller_finds_the_bytes_of_the_cpu(policy, how, run, on_cpu):
    assert not wrong(used(policy, run, how), on_cpu)


@pytest.mark.parametrize("how", ["device", "view, to the device"])
@pytest.mark.parametrize("policy", POLICIES[:5])
def test_views_hold_where_the_next_batch_is_asked_for_and_where_it_never_is(
    policy, how, run, on_cpu
):
    assert not wrong(used(policy, run, how, later=True), on_cpu)
    first = {key: tensor[: 2 * BATCH] for key, tensor in on_cpu.items()}
    assert not wrong(used(policy, run, how, left_after=2), first)


in_returned = partial(in_other_words, _Caller, "returned")
in_run = partial(in_other_words, CudaTransfer, "run")

WAIT_FOR_VIEWING = "self._run_stream.wait_stream(self._viewed_in)"
WAIT_FOR_ASKING = "self._run_stream.wait_stream(torch.cuda.current_stream(self._device))"
RECORD = "slot.filled.record(self._compute)"


def waits(*, for_viewing, for_asking):
    return in_returned(
        (WAIT_FOR_VIEWING, WAIT_FOR_VIEWING if for_viewing else "pass"),
        (WAIT_FOR_ASKING, WAIT_FOR_ASKING if for_asking else "pass"),
    )


SLIPS = {
    "a device slot is filled again while the caller uses it": (
        *("device", run_first),
        waits(for_viewing=False, for_asking=False),
    ),
    "the stream that asks is waited for, not the one that used": (
        *("device", run_first),
        waits(for_viewing=False, for_asking=True),
    ),
    "a host slot is filled again while the caller copies it": (
        *("view, to the device", side_first),
        waits(for_viewing=False, for_asking=False),
    ),
    "all host slots are in the same memory": (
        *("view, on the host", greedy),
        in_other_words(cuda, "ring", ("slot = {}", "slot, start = {}, 0")),
    ),
    "a batch is computed in the memory of a view": (
        *("device", greedy),
        lambda monkeypatch: monkeypatch.setattr(cuda, "_DEVICE_SLOTS", 1),
    ),
    "the caller does not wait for the forward pass": (
        *("device", one_first),
        in_run((", partial(self._wait_on_device, slot.filled)", "")),
    ),
    "the forward pass is recorded too early": (
        *("device", one_first),
        in_run((RECORD, "pass"), ("with self.computing:", f"{RECORD}\n    with self.computing:")),
    ),
    "the run is in the stream that asks": (
        *("copy", one_first),
        in_returned(("torch.cuda.stream(self._run_stream)", "nullcontext()")),
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_shows_as_wrong_bytes(slip, run, on_cpu, monkeypatch):
    how, policy, make = SLIPS[slip]
    make(monkeypatch)
    assert wrong(used(policy, run, how), on_cpu)


def test_a_missing_wait_for_the_stream_that_asks_shows(run, on_cpu, monkeypatch):
    waits(for_viewing=True, for_asking=False)(monkeypatch)
    assert wrong(used(run_first, run, "device", later=True), on_cpu)


def test_a_missing_wait_on_leaving_shows(run, on_cpu, monkeypatch):
    module = sys.modules[_Caller.__module__]
    leaving = "HeldInterrupts(), current(device), caller.returned():\n            run.close()"
    without = leaving.replace(", caller.returned()", "")
    in_other_words(module, "_interruptible", (leaving, without))(monkeypatch)
    first = {key: tensor[: 2 * BATCH] for key, tensor in on_cpu.items()}
    assert wrong(used(run_first, run, "device", left_after=2), first)


# --- CUDA graphs: full batches are replayed, all others run eagerly.

SHORT = BATCH - 3
EAGER = [BATCH] * BATCHES + [SHORT]  # a batch of empty boards, then the run's
RECORDING = [BATCH, BATCH, BATCH - 1]  # once per slot, then the largest batch without a graph


@pytest.fixture
def passes(monkeypatch):
    """Return the numbers of boards in the forward passes that Python ran."""
    lengths, forward = [], Capture.run

    def run(self, tokens_BS, buffers):
        lengths.append(len(tokens_BS))
        forward(self, tokens_BS, buffers)

    monkeypatch.setattr(Capture, "run", run)
    return lengths


def notes(recwarn):
    return [str(each.message) for each in recwarn if each.category is DumpActivationsNote]


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_full_batches_are_replayed_if_asked_for(cuda_graph, run, on_cpu, passes, recwarn):
    with simulated(lazy):
        assert not wrong(joined(stream(**run, cuda_graph=cuda_graph)), on_cpu)
    # The batch of empty boards, recordings with the check, and the short batch; or each batch.
    assert passes == ([BATCH, *RECORDING, SHORT] if cuda_graph else EAGER)
    assert not notes(recwarn)


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_a_replay_allocates_nothing_on_the_device(cuda_graph, run):
    with simulated(lazy) as device:
        counts = [device.allocations for _ in stream(**run, tensors="view", cuda_graph=cuda_graph)]
    # The short batch is computed while the last full one is used.
    assert len(set(counts[:-2])) == (1 if cuda_graph else BATCHES - 2)


in_record = partial(in_other_words, CudaTransfer, "record")
PASS = "forward(slot.boards_BS, slot.buffers)"
MADE = "graph = torch.cuda.CUDAGraph()"


@pytest.mark.parametrize(
    "slip",
    [
        in_record(
            (MADE, f"{MADE}; slot.own = torch.zeros_like(slot.boards_BS)"),
            (PASS, "forward(slot.own, slot.buffers)"),
        ),
        in_record((PASS, "forward(slot.boards_BS, self._slots[0].buffers)")),
        in_record(("slot.graph = graph", "slot.graph = graphs[0]")),
    ],
    ids=["boards are its own", "all fill one slot", "all slots have one graph"],
)
def test_a_slip_in_a_graph_shows_as_wrong_bytes(slip, run, on_cpu, monkeypatch):
    slip(monkeypatch)
    with simulated(greedy):
        assert wrong(joined(stream(**run)), on_cpu)


def test_a_pass_that_cannot_be_recorded_runs_eagerly(run, on_cpu, passes, monkeypatch, recwarn):
    forward = DotProduct.forward

    def synchronised(self, q_BSQD, *others):
        q_BSQD.sum().cpu()
        return forward(self, q_BSQD, *others)

    monkeypatch.setattr(DotProduct, "forward", synchronised)
    with simulated(lazy):
        assert not wrong(joined(stream(**run)), on_cpu)
    assert passes == [BATCH, *EAGER]
    reason = "CUDA error: operation not permitted when stream is capturing"
    assert f"forward passes run without CUDA graphs: {reason}" in notes(recwarn)


def test_graphs_are_given_up_where_a_short_batch_would_find_no_memory(
    run, on_cpu, passes, monkeypatch, recwarn
):
    forward = Capture.run

    def run_in_little_memory(self, tokens_BS, buffers):
        forward(self, tokens_BS, buffers)
        if passes == [BATCH, *RECORDING]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    monkeypatch.setattr(Capture, "run", run_in_little_memory)
    with simulated(lazy):
        assert not wrong(joined(stream(**run)), on_cpu)
    assert passes == [BATCH, *RECORDING, *EAGER[1:]]
    assert "forward passes run without CUDA graphs: CUDA out of memory" in notes(recwarn)


def test_no_workspace_of_the_recordings_is_left_to_others(run, passes, monkeypatch):
    """One that torch keeps for a stream would hold the graphs' memory, and serve other work."""
    dropped_after = []
    monkeypatch.setattr(
        torch._C, "_cuda_clearCublasWorkspaces", lambda: dropped_after.append(len(passes))
    )
    with simulated(lazy):
        next(stream(**run))
    assert dropped_after == [1, 3]  # before the recordings, and before the next pass


class Watched:
    """A lock that says when somebody asks for it."""

    def __init__(self):
        self._lock = threading.Lock()
        self.asked = threading.Semaphore(0)

    def __enter__(self):
        self.asked.release()
        self._lock.acquire()

    def __exit__(self, *_):
        self._lock.release()


@pytest.mark.parametrize("locked", [True, False])
def test_a_run_ends_or_begins_after_another_ones_recording(locked, run, on_cpu, monkeypatch):
    """CUDA lets nobody wait for the device meanwhile, and takes the recording for failed."""
    lock, forward, errors, others = Watched(), DotProduct.forward, [], []
    for module in (cuda, sys.modules[Run.__module__]):
        monkeypatch.setattr(module, "set_up_alone", lock if locked else nullcontext())

    def end_and_begin(other):
        try:
            with torch.cuda.device(CUDA):
                other.close()
                [*stream(**run)]
        except RuntimeError as error:
            errors.append(str(error))

    with simulated(lazy) as device:
        other = stream(**run)

        def meanwhile(self, *inputs):
            if device.recording and not others:
                while lock.asked.acquire(blocking=False):
                    pass
                others.append(threading.Thread(target=end_and_begin, args=(other,)))
                others[0].start()
                while others[0].is_alive() and not lock.asked.acquire(timeout=0.01):
                    pass
            return forward(self, *inputs)

        monkeypatch.setattr(DotProduct, "forward", meanwhile)
        found = joined(stream(**run))
        others[0].join()
    assert not wrong(found, on_cpu)
    assert not errors if locked else "when stream is capturing" in errors[0]


def test_graphs_keep_the_weights_they_read(run, monkeypatch):
    """The caller takes the model's weights away after the first batch."""
    options, models = run | {"precision": "fp32", "n_samples": 5 * BATCH}, []
    expected = joined(stream(**options, device="cpu", allow_cpu=True))
    # The run asks this of the model that it is given.
    monkeypatch.setattr(sys.modules[Run.__module__], "has_callers_code", models.append)
    with simulated(lazy):
        batches = stream(**options)
        found = [next(batches)]
        for module in models.pop().modules():
            module._parameters.clear()
        found += batches
        assert not wrong(joined(found), expected)


def test_a_run_is_closed_while_its_thread_sets_up_another(run, on_cpu, monkeypatch):
    """As the collection of garbage does, with which a recording begins."""
    forward = DotProduct.forward
    with simulated(lazy):
        others = [stream(**run)]

        def meanwhile(self, *inputs):
            others.clear()
            return forward(self, *inputs)

        monkeypatch.setattr(DotProduct, "forward", meanwhile)
        assert not wrong(joined(stream(**run)), on_cpu)


def hooked(model, seen):
    model.blocks[0].register_forward_hook(lambda *_: seen.append(1))


def replaced(model, seen):
    forward = model.final_ln.forward
    model.final_ln.forward = lambda x_BSH: (seen.append(1), forward(x_BSH))[1]


@pytest.mark.parametrize("change", [hooked, replaced])
def test_code_of_the_callers_runs_in_every_batch(change, run, passes, tmp_path, recwarn):
    model = load_encoder(VARIANTS["one-layer"](tmp_path).init)
    seen = []
    change(model, seen)
    with simulated(lazy):
        [*stream(**(run | {"init": model}))]
    assert len(seen) == len(passes) == len(EAGER)
    assert passes == EAGER
    (text,) = notes(recwarn)
    assert text.endswith("without CUDA graphs: the model has code of the caller's")
