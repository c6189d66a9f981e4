"""Writes files from memory, against bare pwrite by as many threads into the same directory.

    python tests/benchmarks/output.py [--directory DIR] [--gib 2] [--threads 4] [--json]

What is written is laid out as a dump of a 50M-parameter model in 16 bits, three stacked keys and
the final hidden state. Every round writes it bare (through the page cache, and past it) and in each
format, with the digests and without; then it reads each file bare and verifies it, out of the page
cache and from the disk. Ratios are taken within a round, and their median is printed. Writing
times run from making the file to its last fsync, but where it says that nothing was flushed.
Whatever is written starts in a directory without the files before it, whose blocks the file system
has taken back: where on a disk a file comes to lie, and what lay there, changes its speed.
"""

import argparse
import contextlib
import functools
import json
import mmap
import os
import queue
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from undigested import undigested

from dump_activations.dtypes import TensorSpec
from dump_activations.storage.formats.registry import FORMATS
from dump_activations.storage.reading.damage import find_damage
from dump_activations.storage.reading.dump_files import inspect_dump
from dump_activations.storage.writing.shards import Output
from dump_activations.storage.writing.work import Work
from dump_activations.storage.writing.writers import Writers
from dump_activations.timing import Chunk

BATCH_ROWS = 128
SLOTS = 3
RAW_BLOCK = 4 << 20
ROW_SHAPES = {
    "final_hidden": (16, 512),
    "layer_outputs": (12, 16, 512),
    "attn_norm": (12, 16, 512),
    "mlp_input": (12, 16, 512),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path.cwd())
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    specs = make_specs(int(options.gib * 2**30))
    results = measure(specs, options)
    if options.json:
        print(json.dumps(results))
    else:
        show(results)


def make_specs(nbytes: int) -> list[TensorSpec]:
    one_row = [TensorSpec(key, "float16", (1, *shape)) for key, shape in ROW_SHAPES.items()]
    rows = nbytes // sum(spec.nbytes for spec in one_row)
    return [
        *(TensorSpec(key, "float16", (rows, *shape)) for key, shape in ROW_SHAPES.items()),
        TensorSpec("boards", "uint8", (rows, 16)),
    ]


def measure(specs: list[TensorSpec], options: argparse.Namespace) -> dict[str, object]:
    slots = [make_slot(specs) for _ in range(SLOTS)]
    size = sum(spec.nbytes for spec in specs)
    contenders: dict[str, Callable[[], float]] = {
        "raw cached": lambda: write_raw(size, options, direct=False, flush=True),
        "raw cached, unflushed": lambda: write_raw(size, options, direct=False, flush=False),
        "raw direct": lambda: write_raw(size, options, direct=True, flush=True),
    }
    for suffix in FORMATS:
        contenders |= format_contenders(suffix, specs, slots, options)
    rounds = [
        {name: size / 1e9 / run() for name, run in contenders.items()}
        for _ in range(options.rounds + 1)
    ][1:]  # the first warms up
    clear(options.directory)
    return {
        "gigabytes": size / 1e9,
        "threads": options.threads,
        "rounds": options.rounds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "slots_mb": SLOTS * sum(array.nbytes for array in slots[0].values()) / 2**20,
        "gigabytes_per_second": {
            name: statistics.median(r[name] for r in rounds) for name in contenders
        },
        "ratios": {suffix: format_ratios(rounds, suffix) for suffix in FORMATS},
    }


def format_contenders(
    suffix: str,
    specs: list[TensorSpec],
    slots: list[dict[str, np.ndarray]],
    options: argparse.Namespace,
) -> dict[str, Callable[[], float]]:
    return {
        f"{suffix} undigested": lambda: write_undigested(suffix, specs, slots, options),
        suffix: lambda: write_file(suffix, specs, slots, options),
        f"{suffix} read cold": lambda: read_raw(suffix, options, cold=True),
        f"{suffix} verified cold": lambda: verify(suffix, options, cold=True),
        f"{suffix} read warm": lambda: read_raw(suffix, options, cold=False),
        f"{suffix} verified warm": lambda: verify(suffix, options, cold=False),
    }


def format_ratios(rounds: list[dict[str, float]], suffix: str) -> dict[str, float]:
    return {
        "written / raw, flushed": ratio(rounds, suffix, "raw cached", "raw direct"),
        "written / raw, unflushed": ratio(rounds, suffix, "raw cached, unflushed"),
        "written / undigested": ratio(rounds, suffix, f"{suffix} undigested"),
        "verified / read, cold": ratio(rounds, f"{suffix} verified cold", f"{suffix} read cold"),
        "verified / read, warm": ratio(rounds, f"{suffix} verified warm", f"{suffix} read warm"),
    }


def ratio(rounds: list[dict[str, float]], name: str, *others: str) -> float:
    """The median over rounds of one speed to the best of others."""
    return statistics.median(r[name] / max(r[other] for other in others) for r in rounds)


def make_slot(specs: list[TensorSpec]) -> dict[str, np.ndarray]:
    """Memory of a batch, page-aligned as pinned memory is, with finite values in it."""
    generator = np.random.default_rng(0)
    slot = {}
    for spec in specs:
        nbytes = BATCH_ROWS * spec.row_nbytes
        slot[spec.name] = np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)
        slot[spec.name][:] = generator.integers(0, 60, nbytes, dtype=np.uint8)
    return slot


def write_file(
    suffix: str,
    specs: list[TensorSpec],
    slots: list[dict[str, np.ndarray]],
    options: argparse.Namespace,
) -> float:
    path = output_path(suffix, options)
    clear(options.directory)
    names = [spec.name for spec in specs]
    rows = specs[0].shape[0]
    free: queue.SimpleQueue[dict[str, np.ndarray]] = queue.SimpleQueue()
    for slot in slots:
        free.put(slot)
    started = time.perf_counter()
    work = Work(
        whole=path,
        specs=specs,
        batched=names,
        batch_rows=BATCH_ROWS,
        metadata={},
        computed_by={},
        identity={},
    )
    with Output(work.files(None), overwrite=True) as output:
        file = output.take()
        with Writers(output.commit, threads=options.threads) as writers:
            for batch, first_row in enumerate(range(0, rows, BATCH_ROWS)):
                slot = free.get()
                count = min(BATCH_ROWS, rows - first_row)
                slices = {s.name: slot[s.name][: count * s.row_nbytes] for s in specs}
                done = functools.partial(free.put, slot)
                writers.submit(file, batch, slices, chunks=[Chunk(0, count)], done=done)
    return time.perf_counter() - started


def clear(directory: Path) -> None:
    for path in directory.glob("benchmark.*"):
        path.unlink()
    os.sync()


def output_path(suffix: str, options: argparse.Namespace) -> Path:
    return options.directory / f"benchmark{suffix}"


def write_undigested(
    suffix: str,
    specs: list[TensorSpec],
    slots: list[dict[str, np.ndarray]],
    options: argparse.Namespace,
) -> float:
    """Writes the file with every pwrite as it is, but nothing looked at."""
    with undigested():
        return write_file(suffix, specs, slots, options)


def verify(suffix: str, options: argparse.Namespace, *, cold: bool) -> float:
    path = output_path(suffix, options)
    drop_from_cache(path, cold=cold)
    started = time.perf_counter()
    assert find_damage(inspect_dump(path), threads=options.threads) == {path: []}
    return time.perf_counter() - started


def read_raw(suffix: str, options: argparse.Namespace, *, cold: bool) -> float:
    path = output_path(suffix, options)
    drop_from_cache(path, cold=cold)
    blocks = iter(range(0, path.stat().st_size, RAW_BLOCK))
    started = time.perf_counter()
    with path.open("rb") as file:
        run_threads(
            options.threads,
            blocks,
            lambda offset, memory: os.preadv(file.fileno(), [memory], offset),
        )
    return time.perf_counter() - started


def drop_from_cache(path: Path, *, cold: bool) -> None:
    if cold:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run_threads(
    threads: int, offsets: Iterator[int], work: Callable[[int, mmap.mmap], object]
) -> None:
    """Calls `work` for every offset, each thread with a block of memory of its own."""
    lock = threading.Lock()

    def run(memory: mmap.mmap) -> None:
        while True:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                return
            work(offset, memory)

    with ThreadPoolExecutor(threads) as dataset:
        for done in [dataset.submit(run, filled_block()) for _ in range(threads)]:
            done.result()


@functools.cache
def noise() -> bytes:
    return np.random.default_rng(0).bytes(RAW_BLOCK)


def filled_block() -> mmap.mmap:
    block = mmap.mmap(-1, RAW_BLOCK)
    block[:] = noise()
    return block


def write_raw(size: int, options: argparse.Namespace, *, direct: bool, flush: bool) -> float:
    path = options.directory / "benchmark.raw"
    clear(options.directory)
    size -= size % 4096
    started = time.perf_counter()
    with opened(path, direct=direct) as fd:
        os.posix_fallocate(fd, 0, size)
        run_threads(
            options.threads,
            iter(range(0, size, RAW_BLOCK)),
            lambda offset, memory: os.pwrite(fd, memoryview(memory)[: size - offset], offset),
        )
        if flush:
            os.fsync(fd)
        seconds = time.perf_counter() - started
    path.unlink()
    return seconds


@contextlib.contextmanager
def opened(path: Path, *, direct: bool) -> Iterator[int]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | (os.O_DIRECT if direct else 0), 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def show(results: dict[str, object]) -> None:
    console = Console()
    speeds = Table("", "GB/s")
    for name, speed in results["gigabytes_per_second"].items():
        speeds.add_row(name, f"{speed:.2f}")
    ratios = Table("", *results["ratios"])
    for name in next(iter(results["ratios"].values())):
        ratios.add_row(name, *(f"{column[name]:.1%}" for column in results["ratios"].values()))
    console.print(speeds, ratios)
    for key in ("gigabytes", "threads", "rounds", "peak_rss_mb", "slots_mb"):
        console.print(f"{key}: {results[key]:.5g}")


if __name__ == "__main__":
    main()
