"""CUDA graphs on a simulated device: full batches are replayed, all others run eagerly."""

from functools import partial

import pytest
import torch
from simulated.checks import KEYS, in_other_words, one_thread, run_arguments, wrong
from simulated.policies import greedy, lazy
from simulated_device import simulated

from dump_activations import DumpActivationsNote, load_encoder, stream
from dump_activations.model.capture import Capture
from dump_activations.model.encoder import DotProduct
from dump_activations.pipeline.cuda import CudaTransfer
from reference.checkpoints import VARIANTS

__all__ = ["one_thread"]
pytestmark = pytest.mark.filterwarnings("always::dump_activations.DumpActivationsNote")

BATCHES, BATCH = 6, 8
SHORT = BATCH - 3
EAGER = [BATCH] * BATCHES + [SHORT]  # a batch of empty boards, then the run's


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    n_samples = (BATCHES - 1) * BATCH + SHORT
    return run_arguments(tmp_path_factory.mktemp("run"), n_samples=n_samples, batch_size=BATCH)


@pytest.fixture(scope="module")
def on_cpu(run, one_thread):
    return joined(stream(**run, device="cpu", allow_cpu=True))


@pytest.fixture
def passes(monkeypatch):
    """Return the numbers of boards in the forward passes that Python ran."""
    lengths, forward = [], Capture.run

    def run(self, tokens_BS, buffers):
        lengths.append(len(tokens_BS))
        forward(self, tokens_BS, buffers)

    monkeypatch.setattr(Capture, "run", run)
    return lengths


def joined(batches):
    batches = [*batches]
    return {key: torch.cat([batch[key].cpu() for batch in batches]) for key in KEYS}


def notes(recwarn):
    return [str(each.message) for each in recwarn if each.category is DumpActivationsNote]


@pytest.mark.parametrize("cuda_graph", [True, False])
def test_full_batches_are_replayed_if_asked_for(cuda_graph, run, on_cpu, passes, recwarn):
    with simulated(lazy):
        assert not wrong(joined(stream(**run, cuda_graph=cuda_graph)), on_cpu)
    # The batch of empty boards, a recording per slot, and the short batch; or each batch.
    assert passes == ([BATCH] * 3 + [SHORT] if cuda_graph else EAGER)
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
