"""Cells straight from a model: those of a dump of the same boards, each once an epoch."""

import itertools
import subprocess
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from simulated.checks import in_other_words
from simulated.policies import at_random, first, greedy, lazy
from simulated_device import simulated
from torch.utils.data import DataLoader

from dump_activations import ActivationsFile, InvalidArgumentError, dump, load_encoder, stream_cells
from dump_activations.api import stream_cells as module

N = 300
ON_CPU = {"device": "cpu", "allow_cpu": True}
SAMPLE = {"n_samples": N, "seed": 3, "where": "max_exponent >= 5"}
ORDER = {"batch_size": 176, "window": 176 * 64 * 4 * 5, "seed": 3}
KEYS = ["mlp_input", "mlp_out"]


@pytest.fixture(scope="module")
def encoder(demo_checkpoint):
    return load_encoder(demo_checkpoint)


@pytest.fixture(scope="module")
def acts(encoder, demo_dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("dump") / "a.safetensors"
    dump(encoder, demo_dataset, path, outputs=[*KEYS, "final_hidden"], **SAMPLE, **ON_CPU)
    return ActivationsFile(path)


@pytest.fixture
def streamed(encoder, demo_dataset):
    def make(key="final_hidden", layer=None, **options):
        chosen = {**SAMPLE, **ON_CPU, **ORDER, "boards_per_pass": 7, **options}
        return stream_cells(encoder, demo_dataset, key, layer, **chosen)

    return make


def places(batches):
    return torch.cat([batch.rows * 16 + batch.cells for batch in batches]).tolist()


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.rows, other.rows)
        assert torch.equal(one.cells, other.cells)
        torch.testing.assert_close(one.values, other.values)


def test_windows_smaller_than_a_pass(acts, streamed):
    expected = acts.cells("final_hidden", **ORDER)
    same(streamed(boards_per_pass=1024), expected)


@pytest.mark.parametrize(("windows", "boards"), [(1, 55), (2, 110), (99, N)])
def test_statistics_are_of_the_first_windows(windows, boards, acts, streamed):
    values = acts.read("mlp_out", slice(boards), layer=2).double().numpy().reshape(-1, 64)
    found = streamed("mlp_out", 2, seed=3, rank=1, world_size=2).stats(windows)
    assert found.keys() == expected_statistics(values).keys()
    for name, expected in expected_statistics(values).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6, err_msg=name)


def expected_statistics(values):
    norms = np.linalg.norm(values, axis=1)
    return {
        **{"count": len(values), "mean": values.mean(0), "variance": values.var(0)},
        **{"min": values.min(0), "max": values.max(0), "norm_mean": norms.mean()},
        "count_abs_gt_6": (np.abs(values) > 6).sum(0),
        "mean_squared_norm": (norms**2).mean(),
    }


def test_statistics_of_several_keys_are_by_key(streamed):
    found, alone = streamed(KEYS, 1).stats(99), streamed("mlp_out", 1).stats(99)
    assert list(found) == KEYS
    np.testing.assert_array_equal(found["mlp_out"]["mean"], alone["mean"])
    with pytest.raises(InvalidArgumentError, match="windows must be at least 1; got 0"):
        streamed(KEYS, 1).stats(0)
    for windows in (1.5, True, "2"):
        with pytest.raises(InvalidArgumentError, match="windows must be at least 1; got"):
            streamed(KEYS, 1).stats(windows)


@pytest.mark.parametrize("key", [("final_hidden",), ("mlp_out", 2), (KEYS, 1)])
def test_batches_are_those_of_a_dump_of_the_same_boards(acts, streamed, key):
    expected = acts.cells(*key, **ORDER, epochs=2)
    found = streamed(*key, epochs=2)
    assert len(found) == len(expected) == 2 * -(-16 * N // 176)
    same(found, expected)


@pytest.mark.parametrize(
    "options", [{"batch_size": 100}, {"batch_size": 16 * N, "window": 10**7}, {"window": 10**6}]
)
def test_each_cell_comes_once_an_epoch(acts, streamed, options):
    stored = acts.read("final_hidden")
    cells = streamed(**options)
    first_epoch, second_epoch = list(cells), list(cells)
    assert places(first_epoch) != places(second_epoch)
    for batches in (first_epoch, second_epoch):
        assert sorted(places(batches)) == list(range(16 * N))
        for batch in batches:
            torch.testing.assert_close(batch.values, stored[batch.rows, batch.cells])


def test_two_loops_in_turns(acts, streamed):
    """Both run one model, and each hears only its own passes."""
    stored, cells = acts.read("final_hidden"), streamed()
    for batches in zip(cells, cells, strict=True):
        for batch in batches:
            torch.testing.assert_close(batch.values, stored[batch.rows, batch.cells])


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_each_window_belongs_to_one_rank(streamed, monkeypatch, world_size, drop_last):
    computed = []
    batches_of = module.batches_of

    def counted(plan, rows, **options):
        computed.extend(row for each in rows for row in each)
        return batches_of(plan, rows, **options)

    monkeypatch.setattr(module, "batches_of", counted)
    options = {"world_size": world_size, "drop_last": drop_last}
    shares = [list(streamed(rank=rank, **options)) for rank in range(world_size)]
    assert len(computed) == len(set(computed))
    assert [len(share) for share in shares] == [
        len(streamed(rank=rank, **options)) for rank in range(world_size)
    ]
    found = places(itertools.chain(*shares))
    assert len(found) == len(set(found))
    if drop_last:
        assert len({len(share) for share in shares}) == 1
        assert {len(batch.rows) for share in shares for batch in share} == {176}
    else:
        assert len(found) == 16 * N


@pytest.mark.parametrize("at", [1, 5, 12])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_resumes_in_the_middle(streamed, at, world_size):
    for rank in range(world_size):
        whole = [*streamed(rank=rank, world_size=world_size, epochs=2)]
        cells = streamed(rank=rank, world_size=world_size)
        taken = list(itertools.islice(cells, at))
        again = streamed(rank=rank, world_size=world_size, seed=3, epoch=9, window=10**6)
        again.load_state_dict(cells.state_dict())
        same([*taken, *again], whole[: len(cells)])
        same(again, whole[len(cells) :])


def test_states_of_other_cells(streamed):
    state = streamed(world_size=2).state_dict()
    with pytest.raises(
        InvalidArgumentError, match="state must be of the same world_size, 1; got 2"
    ):
        streamed().load_state_dict(state)
    with pytest.raises(InvalidArgumentError, match="state must be of the same file"):
        streamed(world_size=2, seed=4).load_state_dict(state)


@pytest.mark.parametrize(
    ("key", "options", "error"),
    [
        (("mlp_out",), {}, "mlp_out has layers 0, 1, 2.*; choose one by layer"),
        (("final_hidden", 1), {}, "layer=1: final_hidden has no layers"),
        (("attn_pattern", 1), {}, "attn_pattern has no axis of cells"),
        (("pooled",), {}, "pooled has no axis of cells"),
        (("rmsnorm_gammas",), {}, "key must name keys with an axis of cells; got rmsnorm_gammas"),
        (("attn_*", 1), {}, r"key must name keys with an axis of cells; got attn_\*"),
        (("final_hidden",), {"world_size": 9}, "world_size must be at most the 6 windows; got 9"),
        (("final_hidden",), {"batch_size": 0}, "batch_size must be at least 1; got 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:layers. no layers")
def test_keys_and_numbers_that_are_refused(streamed, key, options, error):
    with pytest.raises(InvalidArgumentError, match=error):
        streamed(*key, **options)


@pytest.mark.parametrize("call", ["stream(*demo, outputs=key, ", "stream_cells(*demo, key, "])
def test_a_program_that_holds_a_loop_until_its_end_ends_quietly(call):
    program = f"""
import queue
from dump_activations import demo, stream, stream_cells
demo, key = (demo.CHECKPOINT, demo.DATASET), "final_hidden"
queue.held = iter({call}batch_size=16, device="cpu", allow_cpu=True))
next(queue.held)
"""
    command = [sys.executable, "-c", program]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stderr == ""


def test_options_reach_the_run(demo_checkpoint, demo_dataset):
    plain = {"n_samples": 9, "seed": 2, "dtype": "fp16", "precision": "bf16", **ON_CPU}
    given = {**plain, "compile": True, "random_init": True, "where": "max_exponent >= 5"}
    plan = stream_cells(demo_checkpoint, demo_dataset, "final_hidden", **given)._plan
    assert {name: getattr(plan.options, name) for name in given} | {
        "where": plan.options.where.text
    } == given
    for chosen in ({"steps": slice(5, 9)}, {"indices": [7, 5]}):
        plan = stream_cells(demo_checkpoint, demo_dataset, "final_hidden", **plain, **chosen)._plan
        assert plan.indices[:4].tolist() == chosen.get("indices", [5, 6, 7, 8])


def test_workers_of_a_loader_are_refused(streamed):
    same(DataLoader(streamed(), batch_size=None), streamed())
    with pytest.raises(InvalidArgumentError, match="use num_workers=0"):
        list(DataLoader(streamed(), batch_size=None, num_workers=1))


# Numbers of the streams: the default one, the caller's two, and the loop's.
ONE, OTHER, LOOP = range(1, 4)
POLICIES = {
    "lazy": lazy,
    "greedy": greedy,
    "loop_first": first(LOOP),
    "one_first": first(ONE),
    **{f"random-{seed}": at_random(seed) for seed in range(3)},
}


def used(streamed, policy):
    """Return twice the values, each batch taken and used in another stream, under a scheduler."""
    with simulated(policy):
        mine = [torch.cuda.Stream(), torch.cuda.Stream()]
        cells = streamed(device="cuda", precision="bf16")
        with torch.cuda.stream(torch.cuda.Stream()):
            batches = iter(cells)
            found = []
            for i in range(len(cells)):
                with torch.cuda.stream(mine[i % 2]):
                    found.append(next(batches).values * 2)
            assert next(batches, None) is None
        torch.cuda.synchronize()
        return torch.cat([values.cpu() for values in found])


@pytest.fixture(scope="module")
def on_cpu(encoder, demo_dataset):
    options = {**SAMPLE, **ON_CPU, **ORDER, "precision": "bf16", "boards_per_pass": 7}
    cells = stream_cells(encoder, demo_dataset, "final_hidden", **options)
    return torch.cat([batch.values * 2 for batch in cells])


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_the_values_on_a_device_are_those_on_the_cpu(streamed, on_cpu, policy):
    assert torch.equal(used(streamed, policy), on_cpu)


@pytest.mark.parametrize(
    ("wait", "policy"),
    [("caller.wait_stream(stream)", first(OTHER)), ("stream.wait_stream(caller)", first(LOOP))],
)
def test_a_missing_wait_shows(streamed, on_cpu, monkeypatch, wait, policy):
    in_other_words(module, "_choose", (wait, "pass"))(monkeypatch)
    assert not torch.equal(used(streamed, policy), on_cpu)


def test_no_stream_is_entered_without_its_device(streamed):
    """On leaving it torch would set up a context, of 500 MB, on the thread's current device."""
    with simulated(lazy), pytest.MonkeyPatch.context() as patch:
        naming, entering, named = torch.cuda.device, torch.cuda.stream, []

        @contextmanager
        def device(place):
            named.append(place)
            with naming(place):
                yield
            named.pop()

        def stream(entered):
            assert named
            return entering(entered)

        patch.setattr(torch.cuda, "device", device)
        patch.setattr(torch.cuda, "stream", stream)
        assert len([*streamed(device="cuda")]) > 2
