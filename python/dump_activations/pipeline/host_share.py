"""How much of its host's memory a process may page-lock."""

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dump_activations.place import Place

# What is page-locked nobody else has, nor the page cache that writers fill.
_LARGEST_SHARE = 0.5


def share_of_host() -> int:
    """Return the bytes that one of the processes that torchrun started here may page-lock.

    Beyond the limit of a control group there is no error: the kernel kills.
    """
    host = os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE
    most = min([host, *limits_of_groups()]) * _LARGEST_SHARE
    return int(most) // Place.here().local_size


def limits_of_groups(
    memberships: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Yield the memory limits of the control groups (v1 or v2) that this process is in.

    Args:
        memberships: lists the groups, as `ID:CONTROLLERS:PATH`.
        mounted: where they are found; of a container's only the root may be there.
    """
    with suppress(OSError):
        for line in memberships.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield from _limits(mounted, path, "memory.max")
            elif "memory" in controllers.split(","):
                yield from _limits(mounted / "memory", path, "memory.limit_in_bytes")


def _limits(root: Path, path: str, name: str) -> Iterator[int]:
    group = root / path.strip("/")
    for directory in (group, *group.parents):
        if directory.is_relative_to(root):
            with suppress(OSError, ValueError):  # no such file, or `max`
                yield int((directory / name).read_text())
