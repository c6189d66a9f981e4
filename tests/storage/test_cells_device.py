"""Cells on their way to a device, under schedulers that run its work as late or early as may be."""

import pytest
import torch
from safetensors.torch import save_file
from simulated.checks import in_other_words
from simulated.policies import at_random, first, greedy, lazy
from simulated_device import simulated

from dump_activations import ActivationsFile, DeviceError
from dump_activations.storage.reading import cells as reading

OPTIONS = {"batch_size": 64, "window": 3 * 64 * 40}
POLICIES = {
    "lazy": lazy,
    "greedy": greedy,
    "compute_first": first(0),
    "side_first": first(1),
    **{f"random-{seed}": at_random(seed) for seed in range(4)},
}


@pytest.fixture
def acts(tmp_path):
    hidden = torch.arange(60 * 16 * 10.0).view(60, 16, 10)
    save_file({"hidden": hidden, "other": hidden.double()}, tmp_path / "a.safetensors")
    return ActivationsFile(tmp_path / "a.safetensors")


def used_on_the_device(cells):
    """Return twice the values, as a program computes them from each batch before it takes more."""
    used = [batch.values["hidden"] * 2 for batch in cells]
    return torch.cat([values.cpu() for values in used])


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_values_are_those_on_the_host(acts, policy):
    keys = ["hidden", "other"]
    expected = torch.cat([b.values["hidden"] * 2 for b in acts.cells(keys, **OPTIONS)])
    with simulated(policy):
        cells = acts.cells(keys, device="cuda:0", **OPTIONS)
        found = used_on_the_device(cells)
        batch = next(iter(cells))  # and the rest is left
        assert batch.values["other"].device == torch.device("cuda:0")
        assert batch.rows.device == torch.device("cpu")
    assert torch.equal(found, expected)


def test_values_are_wrong_where_no_stream_waits_for_the_copy(acts, monkeypatch):
    expected = torch.cat([b.values["hidden"] * 2 for b in acts.cells(["hidden"], **OPTIONS)])
    monkeypatch.setattr(reading, "_finish_copy", lambda batch, *_: batch)
    with simulated(lazy):
        found = used_on_the_device(acts.cells(["hidden"], device="cuda:0", **OPTIONS))
    assert not torch.equal(found, expected)


WAIT = "stream.wait_stream(torch.cuda.current_stream(device))"


@pytest.mark.parametrize("waits", [True, False])
def test_memory_is_copied_into_after_the_callers_work_on_it(waits, acts, monkeypatch):
    """Memory of a batch that was let go of is the next one's, while work on it is still queued."""
    in_other_words(reading, "_start_copy", (WAIT, WAIT if waits else "pass"))(monkeypatch)
    expected = torch.cat([b.values["hidden"].sum(1) for b in acts.cells(["hidden"], **OPTIONS)])
    with simulated(first(1)):
        cells = acts.cells(["hidden"], device="cuda:0", **OPTIONS)
        # Of another shape, so that the memory of a batch is not theirs.
        used = [batch.values["hidden"].sum(1) for batch in cells]
        found = torch.cat([sums.cpu() for sums in used])
    assert torch.equal(found, expected) == waits


RECORD = "values.record_stream(stream)"


@pytest.mark.parametrize("records", [True, False])
def test_a_batch_that_is_used_in_another_stream_keeps_its_memory(records, acts, monkeypatch):
    """Batches are taken in two streams in turns: each is in memory of the other's stream."""
    in_other_words(reading, "_finish_copy", (RECORD, RECORD if records else "pass"))(monkeypatch)
    expected = torch.cat([b.values["hidden"].sum(1) for b in acts.cells(["hidden"], **OPTIONS)])
    with simulated(first(2)):  # the stream of the copies
        mine = [torch.cuda.Stream(), torch.cuda.current_stream()]
        cells = iter(acts.cells(["hidden"], device="cuda:0", **OPTIONS))
        used = []
        for i in range(len(expected) // OPTIONS["batch_size"]):
            with torch.cuda.stream(mine[i % 2]):
                used.append(next(cells).values["hidden"].sum(1))
        cells.close()
        torch.cuda.synchronize()
        found = torch.cat([sums.cpu() for sums in used])
    assert torch.equal(found, expected) == records


LEFT = "_finish_copy(*ahead, device)\n        batches.close()"


@pytest.mark.parametrize("waits", [True, False])
def test_memory_that_was_copied_ahead_is_the_callers_after_the_copy(waits, acts, monkeypatch):
    change = (LEFT, LEFT if waits else "pass\n        batches.close()")
    in_other_words(reading, "_on_device", change)(monkeypatch)
    with simulated(lazy) as device:
        cells = iter(acts.cells(["hidden"], device="cuda:0", **OPTIONS))
        values = next(cells).values["hidden"]
        cells.close()
        doubled = values * 2
        doubled = doubled.cpu(), device.synchronize(), doubled.cpu()
        assert torch.equal(doubled[2], 2 * values.cpu()) == waits


def test_a_forked_process_is_told_in_one_line(acts, monkeypatch):
    def fail():
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess. To use CUDA, spawn")

    with simulated(lazy):
        monkeypatch.setattr(torch.cuda, "init", fail)
        with pytest.raises(
            DeviceError, match=r"'cuda:0': Cannot .* subprocess; start .* CPU there$"
        ):
            next(iter(acts.cells("hidden", device="cuda:0", **OPTIONS)))


def test_the_next_batch_is_copied_while_one_is_used(acts):
    with simulated(first(1)) as device:
        cells = iter(acts.cells("hidden", device="cuda:0", **OPTIONS))
        next(cells)
        assert device.log.count("copy cpu to cuda") == 2
        cells.close()


@pytest.mark.parametrize(("count", "device"), [(0, "cuda"), (2, "cuda:2")])
def test_a_missing_device(acts, monkeypatch, count, device):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(DeviceError, match=f"='{device}': this machine has {count} CUDA devices"):
        acts.cells("hidden", device=device)
