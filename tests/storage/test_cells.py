"""Cells in a shuffled order: each once an epoch, the same however they are read."""

import gc
import itertools
import os
import pickle
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dump_activations import (
    ActivationsFile,
    CellBatch,
    DumpActivationsError,
    InvalidArgumentError,
    OutputError,
)
from dump_activations.storage.reading import cells as module
from dump_activations.storage.reading import dump_files

LAYERS = (0, 2, 5)
N, H, WIDE = 37, 6, 10
METADATA = {"layers": "0,2,5"}
CELL = 2 * H  # bytes


def tensors(boards=N, seed=0):
    """Make values of which no two are equal."""
    numbers = torch.arange(boards * 3 * 16 * max(H, WIDE)) + 1_000_000 * seed
    mlp = numbers[: boards * 3 * 16 * WIDE].float().view(boards, 3, 16, WIDE)
    hidden = numbers[: boards * 16 * H].to(torch.int16).view(torch.float16).view(boards, 16, H)
    return {
        "indices": torch.arange(boards) + seed,
        "final_hidden": hidden.contiguous(),
        "mlp_post": mlp,
        "attn_q": mlp.reshape(boards, 3, 16, 2, 5).double(),
        "attn_pattern": torch.zeros(boards, 3, 16, 16, 16),
        "pooled": torch.zeros(boards, 16 + 1),
        "empty": torch.zeros(boards, 16, 0),
    }


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cells")
    paths = [directory / name for name in ("stacked.safetensors", "split.safetensors")]
    save_file(tensors(), paths[0], METADATA)
    split = tensors()
    for key in ("mlp_post", "attn_q", "attn_pattern"):
        values = split.pop(key)
        split |= {f"{key}.{n}": values[:, i].contiguous() for i, n in enumerate(LAYERS)}
    save_file(split, paths[1], METADATA)
    return paths


@pytest.fixture(scope="module")
def acts(paths):
    return ActivationsFile(paths[0])


def equal(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.values, other.values)
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.cells, other.cells)


def places(batches):
    """Return the numbers of all cells in their order."""
    return torch.cat([batch.rows * 16 + batch.cells for batch in batches]).tolist()


def expected_order(cells, batch_size, window, seed, epoch, *, shuffle_boards=False):
    """Follow the words of `cells.py`, with NumPy's own permutations."""
    length = window // (batch_size * CELL) * batch_size

    def permutation(n, *key):
        return np.random.default_rng([seed, epoch, *key]).permutation(n)

    windows = [*permutation(cells // length, 0), cells // length]
    order = []
    for number in windows:
        inside = range(cells)[number * length : (number + 1) * length]
        order += [inside[i] for i in permutation(len(inside), 1 + number)]
    boards = permutation(cells // 16, 0, 1) if shuffle_boards else range(cells // 16)
    return [16 * boards[cell // 16] + cell % 16 for cell in order]


@st.composite
def orders(draw):
    batch_size = draw(st.integers(8, 700))
    window = draw(st.integers(batch_size * CELL, max(16 * N, batch_size) * CELL))
    numbers = {name: draw(st.integers(0, 2**40)) for name in ("seed", "epoch")}
    shuffle = {"shuffle_boards": True} if draw(st.booleans()) else {}
    return {"batch_size": batch_size, "window": window, **numbers, **shuffle}


@given(orders())
def test_each_cell_comes_once_in_the_order_that_is_written_down(acts, order):
    stored = load_file(acts.paths[0])["final_hidden"].view(-1, H)
    batches = list(acts.cells("final_hidden", **order))
    assert places(batches) == expected_order(16 * N, **order)
    assert sorted(places(batches)) == list(range(16 * N))
    assert {len(batch.rows) for batch in batches[:-1]} <= {order["batch_size"]}
    for batch in batches:
        assert batch.values.dtype == torch.float16
        expected = stored[batch.rows * 16 + batch.cells]
        assert torch.equal(batch.values.view(torch.int16), expected.view(torch.int16))


@given(st.sampled_from(LAYERS), st.booleans(), st.sampled_from(["mlp_post", "attn_q"]))
def test_a_layer_of_a_stacked_or_split_key(paths, layer, split, key):
    stored = load_file(paths[0])[key][:, LAYERS.index(layer)].reshape(N * 16, WIDE)
    cells = ActivationsFile(paths[split]).cells(key, layer, batch_size=50, window=50 * 8 * WIDE * 3)
    batches = list(cells)
    assert sorted(places(batches)) == list(range(16 * N))
    for batch in batches:
        assert torch.equal(batch.values, stored[batch.rows * 16 + batch.cells])


def test_several_keys_have_the_same_cells(acts):
    stored = load_file(acts.paths[0])
    for batch in acts.cells(["mlp_post", "attn_q"], 5, batch_size=64):
        assert list(batch.values) == ["mlp_post", "attn_q"]
        for key, values in batch.values.items():
            assert torch.equal(values, stored[key][batch.rows, 2, batch.cells].flatten(1))


@given(orders(), st.integers(1, 3))
def test_ranks_take_the_batches_in_turns(acts, order, world_size):
    whole = list(acts.cells("mlp_post", 2, **order | {"window": 1 << 20}))
    shares = [
        acts.cells("mlp_post", 2, rank=rank, world_size=world_size, **order | {"window": 1 << 20})
        for rank in range(world_size)
    ]
    for rank, share in enumerate(shares):
        assert len(share) == len(whole[rank::world_size])
        equal(list(share), whole[rank::world_size])


@given(orders(), st.data())
def test_a_loaded_state_gives_the_rest_of_its_epoch_and_then_whole_ones(acts, order, data):
    first = acts.cells("final_hidden", **order)
    batches = [*first, *first]
    first = acts.cells("final_hidden", **order)
    states = [first.state_dict() for _ in first]
    at = data.draw(st.integers(0, len(states) - 1))
    again = acts.cells("final_hidden", **order | {"seed": 0, "epoch": 0, "window": 10**6})
    again.load_state_dict(states[at])
    assert again.state_dict() == states[at]
    rest = [*again, *again] if at < len(states) - 1 else [*again]
    assert places(rest) == places(batches[at + 1 :])


def take(cells, count):
    """Take some batches of a loop and leave it."""
    return list(itertools.islice(cells, count))


def test_every_loop_is_an_epoch_of_exactly_len_batches(acts):
    """Epochs end without a request for one batch too many, and where a loop is left early."""
    cells = acts.cells("final_hidden", batch_size=50)
    for epoch, count in enumerate([len(cells), 3, len(cells), 0, len(cells)]):
        expected = list(acts.cells("final_hidden", batch_size=50, epoch=epoch))
        assert len(expected) == len(cells) == 12
        assert (
            places(take(cells, count)) == places(expected[:count]) if count else not take(cells, 0)
        )
    pair = [
        acts.cells(key, layer, batch_size=50)
        for key, layer in (("final_hidden", None), ("mlp_post", 2))
    ]
    for _ in range(3):
        both = list(zip(*pair, strict=False))
        assert len(both) == 12
        assert all(torch.equal(a.rows, b.rows) for a, b in both)


def test_the_state_after_the_last_batch_is_the_next_epoch(acts):
    cells = acts.cells("final_hidden", batch_size=50)
    for epoch in range(2):
        assert (cells.state_dict()["epoch"], cells.state_dict()["batch"]) == (epoch, 0)
        take(cells, len(cells))


def test_another_world_size_resumes(acts):
    whole = list(acts.cells("final_hidden", batch_size=32))
    pair = [acts.cells("final_hidden", batch_size=32, rank=r, world_size=2) for r in range(2)]
    for cells in pair:
        take(cells, 3)
    assert pair[0].state_dict() == pair[1].state_dict()
    alone = acts.cells("final_hidden", batch_size=32)
    alone.load_state_dict(pair[0].state_dict())
    assert places(alone) == places(whole[6:])


def test_a_rank_without_a_batch_has_empty_epochs(acts):
    cells = acts.cells("final_hidden", batch_size=16 * N, rank=1, world_size=2)
    assert [len(cells), len(list(cells))] == [0, 0]
    assert (cells.state_dict()["epoch"], cells.state_dict()["batch"]) == (1, 0)


@pytest.mark.parametrize("world_size", [1, 3])
def test_drop_last_leaves_as_many_whole_batches_to_each_rank(acts, world_size):
    options = {"batch_size": 50, "world_size": world_size, "drop_last": True}
    shares = [list(acts.cells("final_hidden", rank=r, **options)) for r in range(world_size)]
    assert {len(share) for share in shares} == {16 * N // 50 // world_size}
    assert {len(batch.rows) for share in shares for batch in share} == {50}


def test_drop_last_leaves_as_many_to_each_of_another_number_of_ranks(acts):
    alone = acts.cells("final_hidden", batch_size=58)
    take(alone, 4)  # of 10
    shares = []
    for rank in range(3):
        cells = acts.cells("final_hidden", batch_size=58, rank=rank, world_size=3, drop_last=True)
        cells.load_state_dict(alone.state_dict())
        shares.append(len(list(cells)))
    assert shares == [2, 2, 2]


@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_whose_loaders_have_workers_take_the_batches_in_turns(acts, drop_last):
    options = {"batch_size": 45, "world_size": 2, "drop_last": drop_last}
    whole = list(acts.cells("final_hidden", batch_size=45))
    for rank in range(2):
        cells = acts.cells("final_hidden", rank=rank, **options)
        found = list(DataLoader(cells, batch_size=None, num_workers=3))
        assert len(found) == len(cells)
        assert places(found) == places(whole[rank::2][: len(cells)])


def test_a_spawned_worker_has_the_same_batches(acts):
    cells = acts.cells("final_hidden", batch_size=40)
    loader = DataLoader(cells, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    found = list(loader)
    assert isinstance(found[0], CellBatch)
    assert places(found) == places(acts.cells("final_hidden", batch_size=40))


@pytest.mark.parametrize("seed", [None, 0])  # of each loop
@pytest.mark.parametrize(
    ("options", "is_pickled"), [({}, False), ({}, True), ({"persistent_workers": True}, False)]
)
def test_workers_begin_the_next_epoch_in_each_loop(acts, options, is_pickled, seed):
    """Also after loops that were left early, by the loader or without one."""
    cells = acts.cells("final_hidden", batch_size=40)
    cells = pickle.loads(pickle.dumps(cells)) if is_pickled else cells
    loader = DataLoader(cells, batch_size=None, num_workers=2, **options)
    for epoch, count in enumerate([15, 2, 15, 15]):
        if seed is not None:
            torch.manual_seed(seed)
        expected = list(acts.cells("final_hidden", batch_size=40, epoch=epoch))
        assert places(take(loader, count)) == places(expected[:count])
    assert places(cells) == places(acts.cells("final_hidden", batch_size=40, epoch=4))


def test_a_loaded_state_in_workers_is_the_rest_of_its_epoch_once(acts):
    started = acts.cells("final_hidden", batch_size=40)
    take(started, 6)
    cells = acts.cells("final_hidden", batch_size=40)
    cells.load_state_dict(started.state_dict())
    loops = [list(DataLoader(cells, batch_size=None, num_workers=2)) for _ in range(3)]
    assert [len(batches) for batches in loops] == [9, 15, 15]
    whole = [list(acts.cells("final_hidden", batch_size=40, epoch=epoch)) for epoch in range(3)]
    assert [places(loop) for loop in loops] == [places(whole[0][6:]), *map(places, whole[1:])]


def test_the_state_of_workers_is_refused_in_the_main_process(acts):
    cells = acts.cells("final_hidden", batch_size=40)
    take(DataLoader(cells, batch_size=None, num_workers=2), 3)
    with pytest.raises(InvalidArgumentError, match=r"StatefulDataLoader .* or num_workers=0"):
        cells.state_dict()
    take(cells, 2)
    assert cells.state_dict()["batch"] == 2


class Stateful(IterableDataset):
    """Loads states in its workers and returns states with batches, as StatefulDataLoader does."""

    def __init__(self, cells, states=None):
        self.cells, self.states = cells, states

    def __iter__(self):
        if self.states is not None:
            self.cells.load_state_dict(self.states[get_worker_info().id])
        for batch in self.cells:
            yield get_worker_info().id, self.cells.state_dict(), batch


def test_a_state_of_each_worker_resumes_each_worker(acts):
    whole = list(acts.cells("final_hidden", batch_size=40))
    loader = DataLoader(
        Stateful(acts.cells("final_hidden", batch_size=40)), batch_size=None, num_workers=2
    )
    taken = take(loader, 6)
    states = {worker: state for worker, state, _ in taken}
    cells = acts.cells("final_hidden", batch_size=40)
    loader = DataLoader(Stateful(cells, states), batch_size=None, num_workers=2)
    assert places([batch for _, _, batch in [*taken, *loader]]) == places(whole)
    loader = DataLoader(cells, batch_size=None, num_workers=2)
    assert places(loader) == places(acts.cells("final_hidden", batch_size=40, epoch=1))


def test_memory_is_reused_when_no_tensor_holds_it(acts):
    addresses = {
        batch.values.untyped_storage().data_ptr()
        for batch in acts.cells("final_hidden", batch_size=16, window=32 * CELL)
    }
    assert len(addresses) <= 3


def test_a_pickle_is_without_the_memory(acts):
    cells = acts.cells("final_hidden", batch_size=16)
    small = len(pickle.dumps(cells))
    assert sum(len(batch.rows) for batch in cells) == 16 * N
    assert len(pickle.dumps(cells)) - small < 100
    copied, expected = pickle.loads(pickle.dumps(cells)), acts.cells("final_hidden", batch_size=16)
    assert places(copied) == places(cells) == places([*expected, *expected][16 * N // 16 :])


def test_several_files_are_one(paths, tmp_path):
    other = tmp_path / "other.safetensors"
    save_file(tensors(11, seed=1), other, METADATA)
    acts = ActivationsFile(paths[0], other)
    assert len(acts) == N + 11
    stored = torch.cat([load_file(path)["mlp_post"] for path in (paths[0], other)])
    assert torch.equal(acts.read("mlp_post", [N, N - 1, N + 10]), stored[[N, N - 1, N + 10]])
    assert acts.indices.tolist() == [*range(N), *range(1, 12)]
    batches = list(acts.cells("mlp_post", 2, batch_size=100))
    assert sorted(places(batches)) == list(range(16 * (N + 11)))
    for batch in batches:
        assert torch.equal(batch.values, stored[batch.rows, 1, batch.cells])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("nothing",), r"stacked.safetensors: no 'nothing' in it, only attn_q, .*, indices"),
        (("mlp_post",), "mlp_post has layers 0, 2, 5; choose one by layer"),
        (("mlp_post", 1), "layer=1: mlp_post has layers 0, 2, 5"),
        (("final_hidden", 0), "layer=0: final_hidden has no layers"),
        (("attn_pattern", 0), "attn_pattern has no axis of cells"),
        (("pooled",), "pooled has no axis of cells"),
        (("indices",), "indices has no axis of cells"),
        (("empty",), "empty has no axis of cells"),
        (([],), "key must name a key; got none"),
    ],
)
def test_keys_that_have_no_cells(acts, paths, arguments, error):
    with pytest.raises(InvalidArgumentError, match=error):
        acts.cells(*arguments)
    with pytest.raises(InvalidArgumentError, match=r"attn_pattern.2 has no axis of cells"):
        ActivationsFile(paths[1]).cells("attn_pattern.2")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        *(
            (change, "state must have seed, epoch, batch, .*, numbers from 0 on; got")
            for change in ({"batch": -3}, {"epoch": "1"}, {"window": 0}, {"more": 1})
        ),
        ({"batch_size": 17}, "state must be of the same batch_size, 16; got 17"),
        ({"cells": 160}, "state must be of the same cells, 592; got 160"),
        ({}, "state must be of the same file"),
    ],
)
def test_states_of_other_cells(acts, tmp_path, change, error):
    save_file(tensors(), tmp_path / "other.safetensors", METADATA | {"fingerprint": "another"})
    other = ActivationsFile(tmp_path / "other.safetensors").cells("final_hidden", batch_size=16)
    with pytest.raises(InvalidArgumentError, match=error):
        acts.cells("final_hidden", batch_size=16).load_state_dict(other.state_dict() | change)


@pytest.mark.parametrize("steps", ["sampled", "in order"])
def test_boards_in_the_order_of_the_dataset_are_warned_of(tmp_path, steps):
    boards = torch.randperm(200) if steps == "sampled" else torch.arange(1000, 1200)
    hidden = torch.arange(200 * 16.0).view(200, 16, 1)
    save_file({"indices": boards, "hidden": hidden}, tmp_path / "a.safetensors")
    acts = ActivationsFile(tmp_path / "a.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        options = {"batch_size": 64, "window": 64 * 4}
        near = next(iter(acts.cells("hidden", **options))).rows.unique()
        far = next(iter(acts.cells("hidden", **options, shuffle_boards=True))).rows.unique()
    found = [str(each.message).partition(": ")[2].partition(",")[0] for each in caught]
    warned = ["its boards are in the order of the dataset"]
    assert found == ([] if steps == "sampled" else warned)
    assert len(near) == len(far) == 4
    assert int(near[-1] - near[0]) == 3 < int(far[-1] - far[0])


def test_values_have_the_dtype_asked_for(acts):
    stored = list(acts.cells("final_hidden", batch_size=300))
    found = list(acts.cells("final_hidden", batch_size=300, dtype=torch.float64))
    for one, other in zip(stored, found, strict=True):
        assert other.values.dtype == torch.float64
        assert torch.equal(one.values.double().nan_to_num(), other.values.nan_to_num())
    pair = next(iter(acts.cells(["mlp_post", "attn_q"], 2, dtype=torch.bfloat16)))
    assert {each.dtype for each in pair.values.values()} == {torch.bfloat16}


def test_a_loop_of_several_epochs_or_without_an_end(acts):
    options = {"batch_size": 40, "epoch": 1}
    whole = [list(acts.cells("final_hidden", batch_size=40, epoch=1 + i)) for i in range(3)]
    two = acts.cells("final_hidden", **options, epochs=2)
    assert len(two) == 30
    assert places(two) == places([*whole[0], *whole[1]])
    in_workers = DataLoader(acts.cells("final_hidden", **options, epochs=2), None, num_workers=2)
    assert sorted(places(in_workers)) == sorted(places([*whole[0], *whole[1]]))
    endless = acts.cells("final_hidden", **options, epochs=None)
    assert places(take(endless, 40)) == places([*whole[0], *whole[1], *whole[2][:10]])
    with pytest.raises(TypeError, match="a loop has no end"):
        len(endless)


def test_a_loop_left_early_cancels_the_read_ahead(acts, monkeypatch):
    given, read = [], dump_files.DumpFiles.read

    def remembered(*arguments, cancel, **options):
        given.append((arguments, options | {"cancel": cancel}))
        read(*arguments, cancel=cancel, **options)

    monkeypatch.setattr(dump_files.DumpFiles, "read", remembered)
    batches = iter(acts.cells("final_hidden", batch_size=16, window=32 * CELL))
    next(batches)
    batches.close()
    (arguments, options), *_ = given
    with pytest.raises(DumpActivationsError, match="interrupted"):
        read(*arguments, **options)


def test_loops_opened_and_dropped_leave_no_thread_or_descriptor(acts):
    def held():
        gc.collect()
        return threading.active_count(), len(list(Path("/proc/self/fd").iterdir()))

    next(iter(acts.cells("final_hidden", batch_size=16, window=32 * CELL)))
    before = held()
    for _ in range(50):
        next(iter(acts.cells("final_hidden", batch_size=16, window=32 * CELL)))
    # What other tests left may end meanwhile.
    assert all(now <= then for now, then in zip(held(), before, strict=True))


@pytest.mark.parametrize(("daemon", "batches"), [(False, 19), (True, 0)])
def test_a_read_where_no_thread_can_start(acts, monkeypatch, daemon, batches):
    """The program ends. It waits for the reads of its threads, and ends a daemon inside of one."""

    def refused(*_):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    monkeypatch.setattr(module.ThreadPoolExecutor, "submit", refused)
    found = []
    cells = acts.cells("final_hidden", batch_size=32)
    thread = threading.Thread(target=lambda: found.extend(cells), daemon=daemon)
    thread.start()
    thread.join()
    assert len(found) == batches


ENDINGS = {
    "held": "batches = iter(cells); next(batches)",
    "held by a module": "queue.batches = iter(cells); next(queue.batches)",
    "thread": "threading.Thread(target=lambda: print(len(list(cells)))).start()",
    "daemon": "threading.Thread(target=lambda: list(cells), daemon=True).start(); time.sleep(0.05)",
    "workers": "batches = iter(DataLoader(cells, batch_size=None, num_workers=2)); next(batches)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_program_that_ends_while_cells_are_read_ends_quietly(tmp_path, ending):
    save_file({"hidden": torch.zeros(4000, 16, 32)}, tmp_path / "a.safetensors")
    program = f"""
import queue, sys, threading, time
from dump_activations import ActivationsFile
from torch.utils.data import DataLoader
cells = ActivationsFile(sys.argv[1]).cells("hidden", batch_size=500, window=500 * 128 * 4)
{ENDINGS[ending]}
"""
    command = [sys.executable, "-c", program, tmp_path / "a.safetensors"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    assert ended.stderr == ""
    printed = "128\n" if ending == "thread" else ""
    assert ended.stdout == printed


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1; got 0"),
        ({"batch_size": 100, "window": 1199}, "window must be at least the 1200 bytes .*; got"),
        ({"rank": 2, "world_size": 2}, "rank must be less than world_size=2; got 2"),
        ({"rank": -1}, "rank must be at least 0; got -1"),
        ({"rank": 0, "world_size": 0}, "rank must be less than world_size=0; got 0"),
        ({"epochs": 0}, "epochs must be at least 1 or None; got 0"),
        ({"dtype": "float32"}, "dtype must be a torch.dtype; got 'float32'"),
        ({"seed": -1}, "seed must be at least 0; got -1"),
        ({"epoch": -1}, "epoch must be at least 0; got -1"),
        ({"device": "meta"}, "device must be cpu or cuda; got 'meta'"),
        ({"device": "gpu"}, "device must be cpu or cuda; got 'gpu'"),
    ],
)
def test_numbers_out_of_range(acts, options, error):
    with pytest.raises(InvalidArgumentError, match=error):
        acts.cells("final_hidden", **options)


def test_a_file_that_changes_meanwhile(paths, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(paths[0].read_bytes())
    seen = iter(ActivationsFile(path).cells("final_hidden", batch_size=16, window=32 * CELL))
    next(seen)
    os.truncate(path, 1000)
    # The window after it may be read at the same time.
    reasons = r"( was replaced or changed since|: row .* the file was cut short before it$)"
    with pytest.raises(OutputError, match=rf"a.safetensors{reasons}"):
        list(seen)
