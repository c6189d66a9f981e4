"""Page-locked memory: how much, when, whose share, and that it is given back."""

import mmap
import threading

import pytest
import torch
from simulated.checks import in_other_words, one_thread
from simulated.memory import PinnedMemory
from simulated.policies import greedy, lazy
from simulated_device import simulated

from dump_activations import dump, load_encoder, stream
from dump_activations.errors import DeviceError, InvalidArgumentError
from dump_activations.model import checkpoint
from dump_activations.pipeline import pinned
from dump_activations.pipeline.host_share import limits_of_groups, share_of_host
from dump_activations.pipeline.transfer import CudaTransfer
from reference.dumps import read_dump

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("disk_takes_no_time")

OPTIONS = {"outputs": ["layer_outputs", "pooled"], "n_samples": 50, "batch_size": 8}
# Of a batch of the demo's: 4 layers, 64 wide, in fp32; each tensor of a slot is whole pages.
SLOT = 8 * 4 * 16 * 64 * 4 + mmap.PAGESIZE


class Watched(PinnedMemory):
    """Page-locked memory that remembers how much was registered."""

    def __init__(self, refusal=0):
        super().__init__()
        self.sizes = []
        self.threads = []
        self.refusal = refusal

    def register(self, address, nbytes):
        self.sizes.append(nbytes)
        self.threads.append(threading.current_thread())
        if not self.refusal:
            super().register(address, nbytes)
        return self.refusal


@pytest.fixture
def memory():
    return Watched()


@pytest.fixture
def share(monkeypatch):
    def of(nbytes):
        monkeypatch.setattr(pinned, "share_of_host", lambda: nbytes)

    return of


def streamed(demo_checkpoint, demo_dataset, **options):
    return stream(demo_checkpoint, demo_dataset, **(OPTIONS | options))


@pytest.fixture
def ways(demo_checkpoint, demo_dataset, tmp_path):
    """Return ways of a run to end, and how many slots each has."""
    arguments = (demo_checkpoint, demo_dataset)

    def fail(*_):
        raise ZeroDivisionError

    def failing_dump():
        with pytest.raises(ZeroDivisionError):
            dump(*arguments, tmp_path / "b.pt", progress=fail, **OPTIONS)

    def failing_plan():
        with pytest.raises(InvalidArgumentError):
            stream(*arguments, labels="no_such_label", **OPTIONS)

    def broken_off():
        next(streamed(*arguments, tensors="borrowed"))

    return {
        "dump": (lambda: dump(*arguments, tmp_path / "a.pt", **OPTIONS), 3),
        "no write": (lambda: dump(*arguments, write=False, **OPTIONS), 0),
        "only weights": (lambda: [*streamed(*arguments, outputs="rmsnorm_gammas")], 0),
        "stream": (lambda: [*streamed(*arguments)], 2),
        "borrowed": (lambda: [*streamed(*arguments, tensors="borrowed")], 2),
        "device": (lambda: [*streamed(*arguments, tensors="device")], 0),
        "failing": (failing_dump, 3),
        "failing before the loop": (failing_plan, 2),
        "broken off": (broken_off, 2),
        "never begun": (lambda: streamed(*arguments), 2),
    }


WAYS = [
    *("dump", "no write", "only weights", "stream", "borrowed", "device"),
    *("failing", "failing before the loop", "broken off", "never begun"),
]


@pytest.mark.parametrize("way", WAYS)
def test_a_run_takes_what_it_needs_and_gives_it_back(way, ways, memory):
    run, slots = ways[way]
    with simulated(lazy, memory) as device:
        run()
        device.synchronize()
    assert memory.sizes == ([slots * SLOT] if slots else [])
    assert not memory.registered
    assert all(not thread.is_alive() for thread in memory.threads)


def test_memory_given_back_before_a_copy_is_found_out(ways, memory, monkeypatch):
    in_other_words(CudaTransfer, "close", ("torch.cuda.synchronize(self._device)", "pass"))(
        monkeypatch
    )
    with simulated(lazy, memory) as device:
        ways["broken off"][0]()
        with pytest.raises(AssertionError, match="unregistered before its copy"):
            device.synchronize()


def test_it_is_taken_while_the_model_is_loaded(demo_checkpoint, demo_dataset, memory, monkeypatch):
    begun = threading.Event()
    load, register = checkpoint._encoder_with, memory.register

    def register_meanwhile(*args):
        begun.set()
        return register(*args)

    def load_meanwhile(*args):
        assert begun.wait(30)
        return load(*args)

    monkeypatch.setattr(memory, "register", register_meanwhile)
    monkeypatch.setattr(checkpoint, "_encoder_with", load_meanwhile)
    with simulated(greedy, memory):
        assert len([*streamed(demo_checkpoint, demo_dataset)]) == 7
    assert threading.main_thread() not in memory.threads


def test_a_small_share_makes_for_fewer_slots(ways, memory, share, tmp_path, demo_checkpoint):
    share(3 * SLOT - 1)
    with simulated(lazy, memory):
        ways["dump"][0]()
    assert memory.sizes == [2 * SLOT]
    assert len(read_dump(tmp_path / "a.pt").tensors["pooled"]) == 50


def test_a_share_without_room_is_an_error_at_once(ways, memory, share, tmp_path):
    share(2 * SLOT - 1)
    text = r"pinned host memory \(2 x .*, and .* is the share .*batch_size=8; .*try batch_size=4$"
    with simulated(lazy, memory):
        for way in ("dump", "stream", "never begun"):
            with pytest.raises(DeviceError, match=text):
                ways[way][0]()
    assert not memory.sizes
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("refusal", "text"),
    [
        (2, r"^out of pinned host memory \(.*: code 2\) .*try batch_size=4$"),
        (304, r"^out of pinned host memory \(.*: code 304\)"),
        (801, r"^cuda:0 cannot page-lock host memory: code 801$"),
    ],
)
def test_what_the_system_refuses(refusal, text, ways, tmp_path):
    memory = Watched(refusal)
    with simulated(lazy, memory), pytest.raises(DeviceError, match=text):
        ways["dump"][0]()
    assert list(tmp_path.iterdir()) == []


def test_a_loaded_model_is_enough(demo_checkpoint, demo_dataset, memory):
    with simulated(lazy, memory):
        model = load_encoder(demo_checkpoint)
        [*stream(model, demo_dataset, **OPTIONS)]
    assert memory.sizes == [2 * SLOT]


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"n_samples": 5}, 5),
        ({"indices": torch.arange(3)}, 3),
        ({"steps": "10:40:5"}, 6),
        ({"steps": "10:40", "where": "step_index % 10 == 0"}, 8),
    ],
)
def test_no_more_than_the_boards_need(options, rows, demo_checkpoint, demo_dataset, memory):
    with simulated(lazy, memory):
        [*streamed(demo_checkpoint, demo_dataset, outputs="layer_outputs", **options)]
    assert memory.sizes == [2 * (SLOT - mmap.PAGESIZE) // 8 * rows]


def test_half_of_the_host_is_shared_by_its_processes(monkeypatch):
    monkeypatch.setattr(
        "dump_activations.pipeline.host_share.limits_of_groups", lambda: iter([1000, 800])
    )
    assert share_of_host() == 400
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "8")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert share_of_host() == 50


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
    assert [*limits_of_groups(tmp_path / "cgroup", tmp_path / "mounted")] == expected
    assert [*limits_of_groups(tmp_path / "none", tmp_path / "mounted")] == []
