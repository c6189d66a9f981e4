"""Keeps processes that share a file out of one another's pages.

A network file system writes whole pages: of two machines that write into one, the later undoes what
the earlier did, even where their bytes lie apart. So a process writes only pages that lie wholly
inside a tensor of one of its tickets; the bytes at both ends, its edges, go into its journal, for
the first process to write.
"""

import threading

from dump_activations.storage.formats.layout import ALIGNMENT
from dump_activations.storage.writing.places import Places
from dump_activations.storage.writing.records import Edges


class Tickets:
    """The batches that a process may write, and their edges until they are recorded."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self._lock = threading.Lock()
        self._tickets: dict[int, range] = {}
        self._edges: dict[int, dict[str, dict[int, bytes]]] = {}

    def begin(self, batches: range) -> None:
        """Add a ticket: consecutive batches that no other process writes."""
        with self._lock:
            self._tickets.update(dict.fromkeys(batches, batches))

    def whole_pages(self, batch: int, name: str) -> tuple[int, int]:
        """Return (start, stop) of the pages of a tensor that are the ticket's alone."""
        with self._lock:
            assert batch in self._tickets, f"batch {batch} is in no ticket"
            ticket = self._tickets[batch]
        start, stop = self._places.of(ticket, name)
        start, stop = -(-start // ALIGNMENT) * ALIGNMENT, stop // ALIGNMENT * ALIGNMENT
        return start, max(start, stop)

    def keep(self, batch: int, name: str, start: int, data: bytes) -> None:
        """Keep bytes that begin `start` bytes into a batch, for its record."""
        with self._lock:
            self._edges.setdefault(batch, {}).setdefault(name, {})[start] = data

    def finish(self, batch: int) -> Edges:
        """Return the edges of a batch, joined where they meet."""
        with self._lock:
            del self._tickets[batch]
            edges = self._edges.pop(batch, {})
        return {name: _joined(pieces) for name, pieces in edges.items()}


def _joined(pieces: dict[int, bytes]) -> list[tuple[int, bytes]]:
    joined: list[tuple[int, bytes]] = []
    for start, data in sorted(pieces.items()):
        before, already = joined.pop() if joined else (start, b"")
        if before + len(already) == start:
            joined.append((before, already + data))
        else:
            joined += [(before, already), (start, data)]
    return joined
