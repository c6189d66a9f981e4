"""The device of a run, and a process's share of its host."""

import os
from functools import partial

import pytest
import torch
from simulated.memory import PinnedMemory
from simulated.policies import lazy
from simulated_device import simulated

from dump_activations import demo, stream
from dump_activations.errors import DeviceError, InvalidArgumentError
from dump_activations.pipeline import device as module
from dump_activations.pipeline.device import (
    cores_of,
    find_device,
    lack_of_cuda,
    pinned_share,
    share_cores,
)

OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 11040). Please update your GPU "
    "driver by downloading and installing a new version. Alternatively, go to: https://pytorch.org"
)
FORKED = (
    "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must "
    "use the 'spawn' start method"
)


def test_devices_are_found_by_name(monkeypatch):
    for name, value in {"init": None, "device_count": 2, "current_device": 1}.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert find_device("cuda") == torch.device("cuda:1")
    assert find_device("cuda:00") == torch.device("cuda:0")
    # torch itself takes cuda:256 for cuda:0.
    for name in ("cuda:2", "cuda:256", "cuda:300"):
        with pytest.raises(DeviceError, match=rf"no {name}; the last one is cuda:1"):
            find_device(name)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OLD_DRIVER, r"\(The .* 11040\)\); install a newer driver, or .*; allow_cpu=True runs"),
        (FORKED, r"\(Cannot .* subprocess\); start processes with spawn; allow_cpu=True runs"),
        ("No CUDA GPUs are available", r"\(No CUDA GPUs are available\); allow_cpu=True runs"),
    ],
    ids=["driver", "fork", "none"],
)
def test_the_reason_for_not_using_cuda_is_one_sentence(error, text, monkeypatch):
    def fail():
        raise RuntimeError(error)

    monkeypatch.setattr(torch.cuda, "init", fail)
    assert lack_of_cuda() == error.partition(". ")[0]
    with pytest.raises(DeviceError, match=f"for 'cuda' {text}"):
        find_device("cuda")


def test_a_batch_too_large_for_flash_attention(demo_checkpoint, demo_dataset):
    with (
        simulated(lazy),
        pytest.raises(InvalidArgumentError, match="batch_size: must be 65,535 or less on CUDA"),
    ):
        stream(demo_checkpoint, demo_dataset, batch_size=65_536)
    options = {"device": "cpu", "allow_cpu": True, "batch_size": 65_536}
    assert len([*stream(demo_checkpoint, demo_dataset, n_samples=3, **options)]) == 1


@pytest.fixture
def group(monkeypatch, tmp_path):
    """Return a function that sets the control groups of the process, and the files in them."""
    monkeypatch.setattr(module, "_MEMBERSHIPS", tmp_path / "cgroup")
    monkeypatch.setattr(module, "_GROUPS", tmp_path / "mounted")

    def make(memberships, **files):
        (tmp_path / "cgroup").write_text(memberships)
        for name, text in files.items():
            path = tmp_path / "mounted" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return make


V1, V2 = "3:cpuset:/a\n0::/\n", "0::/a\n"


@pytest.mark.parametrize(
    ("memberships", "files", "cores"),
    [
        ("", {}, {3: 3, 20: 1, 1: 11}),
        (V2, {"a/cpuset.cpus.effective": "0-15\n"}, {3: 11}),  # bound by the launcher
        (V2, {"a/cpuset.cpus.effective": "0-7,12-14\n"}, {3: 3}),  # all of the container
        (V1, {"cpuset/a/cpuset.effective_cpus": "0-10\n"}, {3: 3}),
        (V1, {"cpuset/cpuset.effective_cpus": "0-11\n"}, {3: 11}),
    ],
)
def test_cores_are_divided_where_a_process_may_run_on_all(
    memberships, files, cores, group, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(11)))
    monkeypatch.setattr(os, "cpu_count", lambda: 11)
    group(memberships, **files)
    assert {processes: cores_of(processes) for processes in cores} == cores


@pytest.mark.parametrize(
    ("variable", "processes", "threads"), [(None, 4, 2), ("1", 4, 2), ("3", 4, 7), ("1", 1, 7)]
)
def test_cores_are_shared_unless_the_user_set_a_number(variable, processes, threads, monkeypatch):
    monkeypatch.setattr(module, "cores_of", lambda processes: 8 // processes)
    monkeypatch.setenv("OMP_NUM_THREADS", variable or "")
    if variable is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    before = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        share_cores(processes)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("memberships", "files", "limit"),
    [
        ("0::/a/b\n", {"a/memory.max": "max\n", "a/b/memory.max": "700\n"}, 700),
        ("0::/of/the/host\n", {"memory.max": "900\n"}, 900),
        ("0::/a\n", {"memory.max": "900", "a/memory.max": "800"}, 800),
        ("0::/a\n", {"memory.max": "700", "a/memory.max": "800"}, 700),
        (
            "5:cpu,cpuacct:/x\n4:hugetlb,memory:/y\n0::/\n",
            {"memory/y/memory.limit_in_bytes": "600", "memory/memory.limit_in_bytes": "650"},
            600,
        ),
        ("1:name=systemd:/\n", {"memory.max": "900"}, 1000),
        ("", {}, 1000),
    ],
)
def test_half_of_the_host_or_container_is_shared_by_its_processes(
    memberships, files, limit, group, monkeypatch
):
    monkeypatch.setattr(os, "sysconf", lambda _: 1000)
    monkeypatch.setattr(module.mmap, "PAGESIZE", 1)
    group(memberships, **files)
    assert pinned_share(1) == limit // 2
    assert pinned_share(8) == limit // 16


@pytest.fixture
def cores_near(monkeypatch, tmp_path):
    """Return a function that sets the kernel's list of cores that are near the device."""
    monkeypatch.setattr(module, "_PCI", tmp_path)

    def put(text):
        (tmp_path / "0000:1b:00.0").mkdir()
        (tmp_path / "0000:1b:00.0" / "local_cpulist").write_text(text)

    return put


class Placed(PinnedMemory):
    """Page-locked memory that remembers where the thread that registers it may run."""

    def register(self, address, nbytes):
        self.cores = os.sched_getaffinity(0)
        return super().register(address, nbytes)


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("near", [None, "", "4095\n", "last-4095\n", "0-4095"])
def test_host_slots_are_touched_first_near_the_device(near, bound, cores_near, request):
    if bound:
        request.addfinalizer(partial(os.sched_setaffinity, 0, os.sched_getaffinity(0)))
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    mine = os.sched_getaffinity(0)
    memory = Placed()
    if near is not None:
        cores_near(near.replace("last", str(max(mine))))
    with simulated(lazy, memory):
        [*stream(demo.CHECKPOINT, demo.DATASET, n_samples=9)]
    assert memory.cores == ({max(mine)} if near == "last-4095\n" else mine)
    assert os.sched_getaffinity(0) == mine
