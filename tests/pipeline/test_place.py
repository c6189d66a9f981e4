"""What a process takes of its machine, by its place among those that torchrun started."""

import os

import pytest
import torch

from dump_activations.errors import DeviceError, InvalidArgumentError
from dump_activations.pipeline.device import find_device, shared_cores
from dump_activations.place import Place

VARIABLES = {
    "RANK": "11",
    "WORLD_SIZE": "16",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "8",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "2",
}
PLACE = Place(rank=11, size=16, local_rank=3, local_size=8, restarts=2)


@pytest.mark.parametrize("missing", [None, "TORCHELASTIC_RESTART_COUNT", "RANK", "MASTER_PORT"])
def test_what_torchrun_says(missing, monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    if missing:
        monkeypatch.delenv(missing)
    place = Place.of_process()
    if missing is None:
        assert place == PLACE
    elif missing == "TORCHELASTIC_RESTART_COUNT":
        assert place == Place(rank=11, size=16, local_rank=3, local_size=8)
    else:
        assert place is None
        assert Place.here() == Place()


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)


def test_each_process_of_a_machine_has_a_gpu_of_its_own(four_gpus):
    assert find_device("cuda", PLACE) == torch.device("cuda:3")
    assert find_device("cuda:2", Place(rank=1, size=2)) == torch.device("cuda:2")
    assert find_device("cuda", Place(rank=1, size=2)) == torch.device("cuda:1")
    with pytest.raises(InvalidArgumentError, match="device='cuda:3': not for 8 processes"):
        find_device("cuda:3", PLACE)
    with pytest.raises(DeviceError, match="no cuda:4; the last one is cuda:3"):
        find_device("cuda", Place(rank=4, size=8, local_rank=4, local_size=8))


@pytest.mark.parametrize(
    ("said", "local_size", "threads"), [(None, 4, 2), ("1", 4, 2), ("3", 4, 7), ("1", 1, 7)]
)
def test_the_cores_are_shared_out(said, local_size, threads, monkeypatch):
    """But where somebody said how many threads there are to be."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(11)))
    if said is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        with shared_cores(Place(size=local_size, local_size=local_size)):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 7
    finally:
        torch.set_num_threads(before)
    assert Place(local_size=20).cores == 1
