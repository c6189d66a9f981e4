"""The compute device of a run, and this process's share of its host's cores and memory."""

import mmap
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch

from dump_activations.errors import DeviceError, option, switch

# Page-locked memory is lost to others, and to the page cache that writers fill.
_LARGEST_SHARE = 0.5


def find_device(name: str) -> torch.device:
    """Return the device of that name.

    Args:
        name: `cuda`, the thread's current CUDA device, `cuda:N` or `cpu`.

    Raises:
        DeviceError: the machine has no such CUDA device.
    """
    kind, _, number = name.partition(":")
    if kind != "cuda":
        return torch.device(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        reason = "torch finds none"
        try:
            torch.cuda.init()
        except Exception as error:  # torch raises several kinds, each with the reason in its text
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise DeviceError(
            f"{option('device')}: no CUDA device for {name!r} ({reason}); "
            f"{option('device', 'cpu')} {switch('allow_cpu')} runs on the CPU"
        )
    if not number:
        return torch.device("cuda", torch.cuda.current_device())
    # Compared here: torch keeps only the low byte of a larger number.
    if int(number) >= count:
        raise DeviceError(f"{option('device')}: no cuda:{number}; the last one is cuda:{count - 1}")
    return torch.device("cuda", int(number))


def current(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which the device is the thread's current one.

    A thread that names no CUDA device sets up a context of some 500 MB on the first one, whichever
    device the run uses.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def device_name(device: torch.device) -> str:
    """Name the hardware, which the last bits of a result may depend on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.backends.cpu.get_cpu_capability()})"


def share_cores(processes: int) -> None:
    """Let torch use this process's share of the cores from now on.

    torchrun sets OMP_NUM_THREADS to 1 where the user has not set it. Any other number is the
    user's, and stays.

    Args:
        processes: processes that share the cores of this machine.
    """
    if processes > 1 and os.environ.get("OMP_NUM_THREADS", "1") == "1":
        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // processes, 1))


def pinned_share(processes: int) -> int:
    """Return the bytes that each of a machine's processes may page-lock.

    Args:
        processes: processes that share the memory of this machine or container. Beyond the limit
            of a control group the kernel kills, without an error.
    """
    host = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    return int(min([host, *group_limits()]) * _LARGEST_SHARE) // processes


def group_limits(
    memberships: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Yield the memory limits of this process's control groups (v1 or v2), in bytes.

    Args:
        memberships: file that lists the groups, as `ID:CONTROLLERS:PATH`.
        mounted: directory of the groups; in a container it may hold only the root.
    """
    with suppress(OSError):
        for line in memberships.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            root = mounted / "memory" if controllers else mounted
            name = "memory.limit_in_bytes" if controllers else "memory.max"
            group = root / path.strip("/")
            for directory in (group, *group.parents):
                if directory.is_relative_to(root):
                    with suppress(OSError, ValueError):  # no such file, or `max`
                        yield int((directory / name).read_text())
