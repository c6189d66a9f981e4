"""Files written from memory and verified, against bare pwrite and pread in the same directory.

A file is laid out as a dump of a 50M-parameter model in 16 bits: three stacked keys and the final
hidden state. Writing times run from the creation of a file to its last fsync, except those named
"unflushed". Files are removed before the next one is written, because the place of a file on a
disk, and what was there before, change its speed.
"""

import mmap
import os
import queue
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from dumps import undigested
from limits import drop_from_cache, read_raw, write_raw
from measure import Figure, Section, compare, timed
from setting import Setting

from dump_activations.dtypes import TensorSpec
from dump_activations.progress import Chunk
from dump_activations.storage.formats.registry import FORMATS
from dump_activations.storage.reading.damage import find_damage
from dump_activations.storage.reading.dump_files import inspect_dump
from dump_activations.storage.writing.shards import Output
from dump_activations.storage.writing.work import Work
from dump_activations.storage.writing.writers import Writers

_THREADS = 4
_BATCH_ROWS = 128
_SLOTS = 3
_ROW_SHAPES = {
    "final_hidden": (16, 512),
    "layer_outputs": (12, 16, 512),
    "attn_norm": (12, 16, 512),
    "mlp_input": (12, 16, 512),
}


def measure(setting: Setting) -> Section:
    """Write each format with and without digests, then read and verify it, cached and cold."""
    specs = _specs(int(setting.gigabytes * 1e9))
    slots = [_slot(specs) for _ in range(_SLOTS)]
    nbytes = sum(spec.nbytes for spec in specs)
    return Section(
        "Output",
        f"{nbytes / 1e9:.1f} GB, {_THREADS} threads",
        [*_writing(setting, specs, slots, nbytes), *_reading(setting, specs, slots, nbytes)],
    )


def _writing(
    setting: Setting, specs: list[TensorSpec], slots: list[dict[str, np.ndarray]], nbytes: int
) -> list[Figure]:
    directory = setting.scratch
    raw = partial(write_raw, directory, nbytes, _THREADS)

    def write(suffix: str) -> float:
        return timed(partial(_write, _path(setting, suffix), specs, slots))

    def write_undigested(suffix: str) -> float:
        with undigested():
            return write(suffix)

    seconds: dict[str, Callable[[], float]] = {
        "raw cached": partial(raw, direct=False),
        "raw cached, unflushed": partial(raw, direct=False, flush=False),
        "raw direct": partial(raw, direct=True),
    }
    for suffix in FORMATS:
        seconds |= {
            suffix: partial(write, suffix),
            f"{suffix} undigested": partial(write_undigested, suffix),
        }

    def speed(run: Callable[[], float]) -> float:
        for path in directory.glob("output.*"):
            path.unlink()
        os.sync()
        return nbytes / 1e9 / run()

    contenders = {name: partial(speed, run) for name, run in seconds.items()}
    rounds = compare(contenders, rounds=setting.rounds)
    figures = rounds.figures("GB/s")
    for suffix in FORMATS:
        figures += [
            rounds.ratio(suffix, "raw cached", "raw direct"),
            rounds.ratio(suffix, "raw cached, unflushed"),
            rounds.ratio(suffix, f"{suffix} undigested"),
        ]
    return figures


def _reading(
    setting: Setting, specs: list[TensorSpec], slots: list[dict[str, np.ndarray]], nbytes: int
) -> list[Figure]:
    figures = []
    for suffix in FORMATS:
        path = _path(setting, suffix)
        _write(path, specs, slots)
        ways = {"read": partial(read_raw, path, _THREADS), "verified": partial(_verify, path)}
        for state in ("cold", "warm"):

            def speed(way: str, state: str = state, path: Path = path, ways=ways) -> float:
                if state == "cold":
                    drop_from_cache(path)
                return nbytes / 1e9 / ways[way]()

            names = {f"{suffix} {way}, {state}": partial(speed, way) for way in ways}
            rounds = compare(names, rounds=setting.rounds)
            read, verified = names
            figures += [*rounds.figures("GB/s"), rounds.ratio(verified, read)]
        path.unlink()
    return figures


def _verify(path: Path) -> float:
    started = time.perf_counter()
    assert find_damage(inspect_dump(path), threads=_THREADS) == {path: []}
    return time.perf_counter() - started


def _path(setting: Setting, suffix: str) -> Path:
    return setting.scratch / f"output{suffix}"


def _specs(nbytes: int) -> list[TensorSpec]:
    one_row = [TensorSpec(key, "float16", (1, *shape)) for key, shape in _ROW_SHAPES.items()]
    rows = nbytes // sum(spec.nbytes for spec in one_row)
    return [
        *(TensorSpec(key, "float16", (rows, *shape)) for key, shape in _ROW_SHAPES.items()),
        TensorSpec("boards", "uint8", (rows, 16)),
    ]


def _slot(specs: list[TensorSpec]) -> dict[str, np.ndarray]:
    """Memory of a batch, page-aligned as pinned memory is, with finite values in it."""
    generator = np.random.default_rng(0)
    slot = {}
    for spec in specs:
        nbytes = _BATCH_ROWS * spec.row_nbytes
        slot[spec.name] = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        slot[spec.name][:] = generator.integers(0, 60, nbytes, dtype=np.uint8)
    return slot


def _write(path: Path, specs: list[TensorSpec], slots: list[dict[str, np.ndarray]]) -> None:
    """Write a file as a dump does, from a ring of slots."""
    rows = specs[0].shape[0]
    free: queue.SimpleQueue[dict[str, np.ndarray]] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    work = Work(
        whole=path,
        specs=specs,
        batched=[spec.name for spec in specs],
        batch_rows=_BATCH_ROWS,
        metadata={},
        computed_by={},
        identity={},
    )
    with Output(work.files(None), overwrite=True) as output:
        file = output.take()
        with Writers(output.commit, threads=_THREADS) as writers:
            for batch, first_row in enumerate(range(0, rows, _BATCH_ROWS)):
                slot = free.get()
                count = min(_BATCH_ROWS, rows - first_row)
                slices = {spec.name: slot[spec.name][: count * spec.row_nbytes] for spec in specs}
                done = partial(free.put, slot)
                writers.submit(file, batch, slices, chunks=[Chunk(0, count)], done=done)
