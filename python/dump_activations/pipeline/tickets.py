"""Cuts the work of a run into tickets, which its processes take one by one."""

from collections.abc import Iterable, Iterator

# Of the largest tensor, about: what a disk writes in one go.
_TICKET_NBYTES = 64 << 20

# The last tickets are this small a part of a process's share of what is left, so that all end
# together, also where one holds two tickets and is half as fast as the others.
_PARTS = 8


def cut_tickets(
    missing: Iterable[range], *, processes: int, largest_nbytes: int
) -> Iterator[range]:
    """Cut stretches of batches into tickets, the larger ones first.

    They depend on nothing but the arguments: all processes cut the same ones.

    Args:
        missing: stretches of batch numbers; a ticket lies inside one of them.
        processes: how many take tickets.
        largest_nbytes: bytes of a batch of the largest tensor.
    """
    missing = tuple(missing)
    left = sum(map(len, missing))
    most = max(_TICKET_NBYTES // max(largest_nbytes, 1), 1)
    for stretch in missing:
        start = stretch.start
        while start < stretch.stop:
            size = min(max(left // (processes * _PARTS), 1), most, stretch.stop - start)
            yield range(start, start + size)
            start, left = start + size, left - size
