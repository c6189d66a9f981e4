"""A thread that brings written batches to disk as the run goes, and journals them."""

import threading
import time

from dump_activations.storage.writing.journal import Journal
from dump_activations.storage.writing.partial import Partial
from dump_activations.storage.writing.records import BatchRecord

SYNC_INTERVAL = 0.5
"""Seconds between two flushes: how much work a crash may cost, against the cost of a flush."""


class BackgroundSync:
    """Flushes the file while it is being written, so that none of it piles up for the end.

    A batch enters the journal after its data is on disk. A failure surfaces from the next call.
    """

    def __init__(self, partial: Partial, journal: Journal) -> None:
        self._partial = partial
        self._journal = journal
        self._written: dict[int, BatchRecord] = {}
        self._changed = threading.Condition()
        self._closing = False
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="output-sync", daemon=True)
        self._thread.start()

    def add(self, batch: int, record: BatchRecord) -> None:
        """Note that all data of a batch has been written."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._written[batch] = record
            self._changed.notify()

    def close(self) -> None:
        """End the thread, with all that was written journalled."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            while batches := self._next_batches():
                self._partial.sync()
                self._journal.append(batches)
        except Exception as error:  # raised by the next call
            with self._changed:
                self._error = error

    def _next_batches(self) -> dict[int, BatchRecord]:
        """Wait for batches to journal; there are none only when the file is being closed."""
        with self._changed:
            deadline = time.monotonic() + SYNC_INTERVAL
            while not self._closing and (
                not self._written or (remaining := deadline - time.monotonic()) > 0
            ):
                self._changed.wait(remaining if self._written else None)
            batches, self._written = self._written, {}
            return batches
