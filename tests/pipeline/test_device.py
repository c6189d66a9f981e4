"""The device of a run, and a process's share of its host."""

import os

import pytest
import torch
from simulated.policies import lazy
from simulated_device import simulated

from dump_activations import stream
from dump_activations.errors import DeviceError, InvalidArgumentError
from dump_activations.pipeline import device as module
from dump_activations.pipeline.device import find_device, group_limits, pinned_share, share_cores


def test_devices_are_found_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert find_device("cuda") == torch.device("cuda:1")
    assert find_device("cuda:00") == torch.device("cuda:0")
    # torch itself takes cuda:256 for cuda:0.
    for name in ("cuda:2", "cuda:256", "cuda:300"):
        with pytest.raises(DeviceError, match=rf"no {name}; the last one is cuda:1"):
            find_device(name)


def test_a_batch_too_large_for_flash_attention(demo_checkpoint, demo_dataset):
    with (
        simulated(lazy),
        pytest.raises(InvalidArgumentError, match="batch_size: must be 65,535 or less on CUDA"),
    ):
        stream(demo_checkpoint, demo_dataset, batch_size=65_536)
    options = {"device": "cpu", "allow_cpu": True, "batch_size": 65_536}
    assert len([*stream(demo_checkpoint, demo_dataset, n_samples=3, **options)]) == 1


@pytest.mark.parametrize(
    ("variable", "processes", "threads"), [(None, 4, 2), ("1", 4, 2), ("3", 4, 7), ("1", 1, 7)]
)
def test_cores_are_shared_unless_the_user_set_a_number(variable, processes, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(11)))
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


def test_half_of_the_host_is_shared_by_its_processes(monkeypatch):
    monkeypatch.setattr(module, "group_limits", lambda: iter([1000, 800]))
    assert pinned_share(1) == 400
    assert pinned_share(8) == 50


@pytest.mark.parametrize(
    ("memberships", "limits", "expected"),
    [
        ("0::/a/b\n", {"a/memory.max": "max\n", "a/b/memory.max": "70\n"}, [70]),
        ("0::/of/the/host\n", {"memory.max": "90\n"}, [90]),
        ("0::/a\n", {"memory.max": "90", "a/memory.max": "80"}, [80, 90]),
        (
            "5:cpu,cpuacct:/x\n4:hugetlb,memory:/y\n0::/\n",
            {"memory/y/memory.limit_in_bytes": "60", "memory/memory.limit_in_bytes": "65"},
            [60, 65],
        ),
        ("1:name=systemd:/\n", {"memory.max": "90"}, []),
    ],
)
def test_limits_of_control_groups(memberships, limits, expected, tmp_path):
    (tmp_path / "cgroup").write_text(memberships)
    for name, text in limits.items():
        (tmp_path / "mounted" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mounted" / name).write_text(text)
    assert [*group_limits(tmp_path / "cgroup", tmp_path / "mounted")] == expected
    assert [*group_limits(tmp_path / "none", tmp_path / "mounted")] == []
