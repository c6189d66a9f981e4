"""Threads that write batches: their waits, errors, and the memory that they give back."""

import errno
import os
import threading
import time
from functools import partial

import numpy as np
import pytest

from dump_activations import _rust
from dump_activations.errors import OutputError
from dump_activations.progress import Chunk
from dump_activations.storage.writing import writers as writers_module
from dump_activations.storage.writing.writers import Writers
from output_support import (
    no_new_descriptors,
    open_file,
    small_dump,
    write_dump,
    write_whole_tensors,
)

MANY = small_dump(rows=400)


class InjectedError(Exception):
    pass


def fail() -> None:
    raise InjectedError


def no_disk(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


class Slots:
    """Counts how often each batch's memory was given back."""

    def __init__(self) -> None:
        self.given_back: dict[int, int] = {}

    def submit(self, writers: Writers, file, dump, batch: int, *, done=lambda: None, **options):
        self.given_back[batch] = 0

        def give_back() -> None:
            self.given_back[batch] += 1
            done()

        slices = dump.batch(batch * dump.batch_rows)
        writers.submit(file, batch, slices, done=give_back, **options)


@pytest.mark.parametrize("least", [1, 1 << 20])
def test_each_chunk_is_read_after_its_wait(tmp_path, monkeypatch, least):
    monkeypatch.setattr(writers_module, "MIN_CHUNK_NBYTES", least)
    monkeypatch.setattr(writers_module, "SPAN_NBYTES", 100)
    dump = small_dump()
    waits = []
    with open_file(tmp_path / "x.npz", dump) as file:
        write_whole_tensors(file, dump)
        with Writers(lambda _: None, threads=4) as writers:
            for batch, first_row in enumerate(dump.first_rows):
                slices = dump.batch(first_row)
                memory = {name: np.zeros_like(data) for name, data in slices.items()}
                rows = len(slices["boards"]) // 16

                def fill(start, stop, rows=rows, memory=memory, slices=slices) -> None:
                    waits.append((start, stop))
                    for name, data in slices.items():
                        row = len(data) // rows
                        memory[name][start * row : stop * row] = data[start * row : stop * row]

                chunks = [
                    Chunk(start, min(start + 3, rows), partial(fill, start, min(start + 3, rows)))
                    for start in range(0, rows, 3)
                ]

                def wipe(memory=memory) -> None:
                    for data in memory.values():
                        data[:] = 255

                writers.submit(file, batch, memory, chunks=chunks, done=wipe)
        assert writers.busy.seconds > 0
        file.commit()
    assert set(waits) == {(0, 3), (3, 4)}
    other = write_dump(tmp_path / "other.npz", dump)
    assert (tmp_path / "x.npz").read_bytes() == other.read_bytes()


FAILURES = {
    "write": ({}, OutputError),
    "wait": ({"chunks": [Chunk(0, 4, fail)]}, InjectedError),
    "done": ({"done": fail}, InjectedError),
}


@pytest.mark.parametrize(("options", "error"), FAILURES.values(), ids=FAILURES)
def test_the_first_error_surfaces_as_itself_with_all_memory_given_back(
    tmp_path, monkeypatch, options, error
):
    slots, threads_before = Slots(), threading.active_count()
    write_span, writes = _rust.write_span, iter(range(10**6))

    def failing_write(*arguments):
        return (no_disk if error is OutputError and next(writes) > 20 else write_span)(*arguments)

    monkeypatch.setattr(_rust, "write_span", failing_write)

    def write_all() -> None:
        with Writers(lambda _: None, threads=3) as writers:
            for batch in range(100):
                slots.submit(writers, file, MANY, batch, **(options if batch == 10 else {}))

    with no_new_descriptors(), open_file(tmp_path / "x.pt", MANY) as file:
        with pytest.raises(error) as caught:
            write_all()
        if error is OutputError:
            assert caught.value.errno == errno.EIO
            assert str(caught.value) == f"cannot write {file.partial}: Input/output error"
        file.suspend()
    assert set(slots.given_back.values()) == {1}
    assert threading.active_count() == threads_before


def test_an_error_stops_the_next_submit(tmp_path, monkeypatch):
    """A caller that never runs out of memory to hand over would go on to the end otherwise."""
    slots = Slots()
    monkeypatch.setattr(_rust, "write_span", no_disk)

    def submit_all(writers: Writers) -> None:
        for batch in range(100):
            slots.submit(writers, file, MANY, batch)
            while writers._error is None:
                time.sleep(0.001)

    with (
        pytest.raises(OutputError, match="Input/output error"),
        open_file(tmp_path / "x.pt", MANY) as file,
        Writers(lambda _: None, threads=1) as writers,
    ):
        submit_all(writers)
    assert slots.given_back == {0: 1, 1: 1}


def test_buffers_are_given_back_before_the_file_is_committed(tmp_path):
    dump, slots, seen = small_dump(), Slots(), []
    with open_file(tmp_path / "x.pt", dump) as file:
        with Writers(lambda _: seen.append(set(slots.given_back.values())), threads=1) as writers:
            for batch in range(6):
                slots.submit(writers, file, dump, batch)
        assert seen == [{1}]


def test_an_error_of_the_caller_is_not_covered_up(tmp_path):
    slots = Slots()

    def write_and_fail() -> None:
        with Writers(lambda _: None, threads=2) as writers:
            slots.submit(writers, file, MANY, 0, chunks=[Chunk(0, 4, fail)])
            raise KeyError("the caller's own")

    with open_file(tmp_path / "x.pt", MANY) as file, pytest.raises(KeyError):
        write_and_fail()
    assert slots.given_back == {0: 1}
