"""Checks that tests under the simulated device share."""

import inspect
import textwrap
from concurrent.futures import Executor, Future

import pytest
import torch

from reference.checkpoints import VARIANTS
from reference.datasets import make_dataset
from simulated.policies import at_random

KEYS = ["layer_outputs", "pooled"]


def named(**policies):
    return [pytest.param(policy, id=name) for name, policy in policies.items()]


def randoms(seeds):
    return named(**{f"random-{seed}": at_random(seed) for seed in range(seeds)})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Have the CPU compute a batch as a whole, as the device does: the same kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run_arguments(directory, **options):
    """Return the arguments of a run of `KEYS`, whose model and dataset are made in a directory."""
    return {
        "init": VARIANTS["one-layer"](directory / "checkpoint").init,
        "dataset": make_dataset(directory / "dataset", "packed_46", n=97).path,
        "outputs": KEYS,
        **options,
    }


class AtOnce(Executor):
    """Does what it is asked for at once, so that tests need not wait for a thread."""

    def __init__(self, *_, **__):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


def wrong(found, expected):
    """Name the tensors in which any byte differs."""
    assert found.keys() == expected.keys()
    return {
        key
        for key, tensor in expected.items()
        if not torch.equal(found[key].view(torch.uint8), tensor.view(torch.uint8))
    }


def in_other_words(owner, name, *changes):
    """Return a slip: other words, (old, new), in the source of a function, which has them once."""

    def make(monkeypatch):
        function = getattr(owner, name)
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in changes:
            assert source.count(old) == 1, f"{name} has changed; where is {old!r}?"
            source = source.replace(old, new)
        made = {}
        exec(source, function.__globals__, made)
        monkeypatch.setattr(owner, name, made[name])

    return make
