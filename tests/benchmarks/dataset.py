"""Opens, samples and reads datasets, against plain NumPy in the same run.

    python tests/benchmarks/dataset.py [--directory DIR] [--sparse-gb 8] [--rounds 5] [--json]

Datasets are made below the directory and removed again (--keep leaves them for the next run).
Medians are printed, and the median of the ratios of rounds with the same indices. "Dense" rows lie
a few kilobytes apart, "sparse" ones further; "warm" means that the page cache holds the dataset,
"cold" that it holds none of it, which is checked.
"""

import argparse
import ctypes
import json
import mmap
import os
import queue
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from baseline import decode_boards, gather_rows, open_shards
from rich.console import Console
from rich.table import Table

from dump_activations import StepsDataset, dump

REPOSITORY = Path(__file__).parents[2]
DEMO = REPOSITORY / "python" / "dump_activations" / "demo"
ROW = StepsDataset(DEMO / "dataset").dtype  # 46 bytes
BATCH = 1024
WINDOW = 1 << 20  # rows that a dump reads in one call
SECTIONS = ["open", "sample", "memory", "warm", "cold", "feed", "scan", "labels"]


@dataclass
class Figure:
    """One line of the table: what was measured, on both sides, and what is aimed at."""

    name: str
    ours: float
    other: float | None
    unit: str
    ratio: float | None
    target: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--dense-rows", type=int, default=40_000_000)
    parser.add_argument("--sparse-gb", type=float, default=8.0)
    parser.add_argument("--boards", type=int, default=1_000_000)
    parser.add_argument("--cold-boards", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    root = options.directory / "dataset-benchmark"
    try:
        figures = [figure for name in options.only for figure in MEASURES[name](root, options)]
    finally:
        if not options.keep:
            shutil.rmtree(root, ignore_errors=True)
    if options.json:
        print(json.dumps([asdict(figure) for figure in figures]))
    else:
        show(figures)


def show(figures: list[Figure]) -> None:
    table = Table("", "this package", "NumPy", "unit", "ratio", "target")
    for figure in figures:
        table.add_row(
            figure.name,
            f"{figure.ours:.4g}",
            "" if figure.other is None else f"{figure.other:.4g}",
            figure.unit,
            "" if figure.ratio is None else f"{figure.ratio:.2f}",
            figure.target,
        )
    Console().print(table)


def compare(
    name: str, ours: list[float], other: list[float], target: str, *, unit: str = "s"
) -> Figure:
    """Make a figure of how many times longer the other took, round by round."""
    ratio = statistics.median(b / a for a, b in zip(ours, other, strict=True))
    return Figure(name, statistics.median(ours), statistics.median(other), unit, ratio, target)


def rounds(
    draws: list[np.ndarray], *contenders: Callable[[np.ndarray], float]
) -> tuple[list[float], ...]:
    """Measure the contenders one after the other, once for each draw."""
    measured = [[measure(indices) for measure in contenders] for indices in draws]
    return tuple([*times] for times in zip(*measured, strict=True))


def seconds(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


# Datasets


def make_dataset(directory: Path, rows: int, shards: int) -> Path:
    """Write a dataset of random rows; each shard repeats a block of a million."""
    if directory.exists():
        return directory
    directory.mkdir(parents=True)
    block = np.random.default_rng(0).bytes(min(1_000_000, rows // shards) * ROW.itemsize)
    for shard in range(shards):
        with (directory / f"steps-{shard:05}.npy").open("wb") as file:
            left = write_header(file, rows // shards) * ROW.itemsize
            while left:
                left -= file.write(block[:left])
            os.fsync(file)
    return directory


def make_empty_dataset(directory: Path, rows: int, shards: int) -> Path:
    """Make a dataset whose rows take no space on the disk."""
    if directory.exists():
        return directory
    directory.mkdir(parents=True)
    for shard in range(shards):
        with (directory / f"steps-{shard:05}.npy").open("wb") as file:
            file.truncate(write_header(file, rows // shards) * ROW.itemsize + file.tell())
    return directory


def write_header(file, rows: int) -> int:
    header = {"descr": ROW.descr, "fortran_order": False, "shape": (rows,)}
    np.lib.format.write_array_header_1_0(file, header)
    return rows


def warm(directory: Path) -> None:
    buffer = bytearray(1 << 20)
    for path in directory.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def chill(directory: Path) -> None:
    """Drop the dataset from the page cache, and check that it is gone."""
    for path in directory.iterdir():
        with path.open("rb") as file:
            for _ in range(10):  # a page that another CPU has in hand is not dropped at once
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if (kept := resident_pages(file.fileno())) == 0:
                    break
                time.sleep(0.1)
            else:
                sys.exit(f"{path}: {kept} pages stay in the page cache")


def resident_pages(descriptor: int) -> int:
    mapped = np.frombuffer(mmap.mmap(descriptor, 0, prot=mmap.PROT_READ), np.uint8)
    pages = np.zeros(-(-mapped.size // mmap.PAGESIZE), np.uint8)
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
    if mincore(mapped.ctypes.data, mapped.size, pages.ctypes.data):
        raise OSError(ctypes.get_errno(), "mincore")
    return int((pages & 1).sum())


# Reading, timed


def time_ours(directory: Path, indices: np.ndarray, window: int, prepare: Callable) -> float:
    """Return the seconds to read boards, a window a call, from a dataset just opened."""
    dataset = StepsDataset(directory)
    prepare(directory)
    return seconds(lambda: read_windows(dataset, indices, window))


def read_windows(dataset: StepsDataset, indices: np.ndarray, window: int) -> None:
    for start in range(0, len(indices), window):
        dataset.read_boards(indices[start : start + window])


def time_numpy(directory: Path, indices: np.ndarray, batch: int, prepare: Callable) -> float:
    """Return the seconds to gather and decode boards, a batch at a time, from fresh mappings."""
    shards = open_shards(directory)
    prepare(directory)
    return seconds(lambda: read_batches(shards, indices, batch))


def read_batches(shards: list[np.ndarray], indices: np.ndarray, batch: int) -> None:
    for start in range(0, len(indices), batch):
        decode_boards(gather_rows(shards, indices[start : start + batch]))


# What is measured


def measure_open(root: Path, options: argparse.Namespace) -> list[Figure]:
    directory = make_empty_dataset(root / "empty", options.shards * 1_000_000, options.shards)
    code = f"""
        import json, resource, time
        import numpy as np
        from pathlib import Path
        from dump_activations import StepsDataset
        StepsDataset
        directory = Path({str(directory)!r})

        def seconds(action):
            started = time.perf_counter()
            action()
            return time.perf_counter() - started

        def ours():
            StepsDataset(directory)

        def other():
            [np.load(path, mmap_mode="r") for path in sorted(directory.iterdir())]

        took = [[seconds(ours), seconds(other)] for _ in range({options.rounds})]
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
        print(json.dumps([*zip(*took), [seconds(ours) for _ in range({options.rounds})]]))
    """
    ours, other, limited = json.loads(run(code))
    name = f"open {options.shards} shards"
    return [
        compare(name, ours, other, ">= 5"),
        compare(f"{name} under ulimit -n 256 (NumPy without)", limited, other, ">= 5"),
    ]


def run(code: str) -> str:
    """Run code in a process of its own, where `peak_mb` counts from its last reset."""
    prelude = """
        from pathlib import Path

        def reset_peak():
            Path("/proc/self/clear_refs").write_text("5")
            return peak_mb()

        def peak_mb():
            status = Path("/proc/self/status").read_text()
            return int(status.split("VmHWM:")[1].split()[0]) / 1000
    """
    command = [sys.executable, "-c", textwrap.dedent(prelude) + textwrap.dedent(code)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def measure_sample(_root: Path, options: argparse.Namespace) -> list[Figure]:
    figures = []
    for rows, n, rounds, target in (
        (10**9, 21_000_000, 1, ">= 2"),
        (10**10, 1_000_000, options.rounds, ">= 1"),
    ):
        ours = [sample_alone(rows, n, numpy=False) for _ in range(rounds)]
        other = [sample_alone(rows, n, numpy=True) for _ in range(rounds)]
        name = f"sample {n:.3g} of {rows:.0e}"
        took = [took for took, _ in ours], [took for took, _ in other]
        figures.append(compare(name, *took, target))
        peaks = max(peak for _, peak in ours), max(peak for _, peak in other)
        figures.append(Figure(f"{name}: peak memory", *peaks, "MB", None, "<= 1000"))
    return figures


def sample_alone(rows: int, n: int, *, numpy: bool) -> tuple[float, float]:
    """Return the seconds of a sample in a process of its own, and the MB it added to the peak."""
    call = f"np.random.default_rng(0).choice({rows}, {n}, replace=False)"
    if not numpy:
        call = f"sample({rows}, {n}, 0)"
    code = f"""
        import time
        import numpy as np
        from dump_activations.dataset.sampling import sample
        np.random.default_rng(0).choice(100, 10, replace=False)
        before = reset_peak()
        started = time.perf_counter()
        {call}
        took = time.perf_counter() - started
        print([took, peak_mb() - before])
    """
    took, peak = json.loads(run(code))
    return took, peak


def measure_memory(root: Path, options: argparse.Namespace) -> list[Figure]:
    directory = make_empty_dataset(root / "empty", options.shards * 1_000_000, options.shards)
    code = f"""
        from dump_activations import StepsDataset
        StepsDataset
        before = reset_peak()
        dataset = StepsDataset({str(directory)!r})
        dataset.read_boards(dataset.sample_indices(1_000_000))
        print(peak_mb() - before)
    """
    name = f"open {options.shards * 1_000_000:.0e} rows, sample and read 1e6: peak memory"
    return [Figure(name, float(run(code)), None, "MB", None, "< 200")]


def measure_warm(root: Path, options: argparse.Namespace) -> list[Figure]:
    dense = make_dataset(root / "dense", options.dense_rows, 4)
    sparse = make_dataset(root / "sparse", int(options.sparse_gb * 1e9 / ROW.itemsize), 8)
    figures = []
    for name, directory, target in (("dense", dense, ">= 5"), ("sparse", sparse, ">= 3")):
        gigabytes = sum(path.stat().st_size for path in directory.iterdir()) / 1e9
        label = f"warm {name}, {gigabytes:.1f} GB"
        figures += measure_reads(label, directory, options, target)
    return [*figures, *measure_lone_calls(dense, options)]


def measure_reads(
    label: str, directory: Path, options: argparse.Namespace, target: str
) -> list[Figure]:
    """Read many boards in one call, and in windows against batches, both on fresh mappings."""
    n = options.boards
    sizes = {f"{n:.0e} in one call": (n, n), f"{n:.0e} as a dump reads them": (WINDOW, BATCH)}
    figures = []
    for name, (window, batch) in sizes.items():
        draws = [draw(directory, n, seed) for seed in range(options.rounds)]
        ours, other = rounds(
            draws,
            lambda indices, w=window: time_ours(directory, indices, w, warm),
            lambda indices, b=batch: time_numpy(directory, indices, b, warm),
        )
        figures.append(compare(f"{label}: {name}", ours, other, target))
    return figures


def draw(directory: Path, n: int, seed: int) -> np.ndarray:
    return StepsDataset(directory).sample_indices(n, seed=seed)


def measure_lone_calls(directory: Path, options: argparse.Namespace) -> list[Figure]:
    """Read 1,024 rows once from a dataset just opened, and again from one much used."""
    draws = [draw(directory, BATCH, seed) for seed in range(10 * options.rounds)]
    ours, other = rounds(
        draws,
        lambda indices: time_ours(directory, indices, BATCH, warm),
        lambda indices: time_numpy(directory, indices, BATCH, warm),
    )
    first = compare("warm dense: 1,024 rows in a lone call", ours, other, ">= 1.5")
    dataset, shards = StepsDataset(directory), open_shards(directory)
    used = draw(directory, options.boards, 0)
    read_batches(shards, used, BATCH)
    warm(directory)
    ours, other = rounds(
        draws,
        lambda indices: seconds(lambda: read_windows(dataset, indices, BATCH)),
        lambda indices: seconds(lambda: read_batches(shards, indices, BATCH)),
    )
    return [first, compare("warm dense: 1,024 rows, all pages mapped", ours, other, "")]


def measure_cold(root: Path, options: argparse.Namespace) -> list[Figure]:
    directory = make_dataset(root / "sparse", int(options.sparse_gb * 1e9 / ROW.itemsize), 8)
    n = options.cold_boards
    draws = [draw(directory, n, seed) for seed in range(options.rounds)]
    ours, other, bare = rounds(
        draws,
        lambda indices: time_ours(directory, indices, n, chill),
        lambda indices: time_numpy(directory, indices, BATCH, chill),
        lambda indices: time_bare(root, directory, indices),
    )
    label = f"cold, {options.sparse_gb:g} GB: {n:.0e} boards"
    figures = [compare(label, ours, other, ">= 20")]
    figures.append(compare(f"{label}, against a bare loop", ours, bare, ">= 0.7"))
    return figures


def time_bare(root: Path, directory: Path, indices: np.ndarray) -> float:
    """Return the seconds to read the rows' boards on 64 threads and do nothing with them."""
    shards = StepsDataset(directory).shards
    firsts = np.array([shard.first for shard in shards])
    headers = np.array([shard.path.stat().st_size - shard.rows * ROW.itemsize for shard in shards])
    ordered = np.sort(indices)
    shard = np.searchsorted(firsts, ordered, side="right") - 1
    offset = headers[shard] + (ordered - firsts[shard]) * ROW.itemsize + ROW.fields["board"][1]
    plan = root / "plan.bin"
    np.stack([shard, offset], axis=1).astype("<u8").tofile(plan)
    chill(directory)
    cargo = ["cargo", "run", "--quiet", "--release", "--example", "bare_reads", "--"]
    command = [*cargo, "14", plan, *(shard.path for shard in shards)]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout)


def measure_feed(root: Path, options: argparse.Namespace) -> list[Figure]:
    """Dump the demo checkpoint on CPU from a cold dataset; the share of time the loop waits."""
    directory = make_dataset(root / "sparse", int(options.sparse_gb * 1e9 / ROW.itemsize), 8)
    waits = []
    for seed in range(options.rounds):
        chill(directory)
        summary = dump(
            DEMO / "checkpoint",
            directory,
            outputs=["final_hidden"],
            n_samples=65_536,
            seed=seed,
            device="cpu",
            allow_cpu=True,
            write=False,
        )
        waits.append(100 * summary.waiting_seconds / summary.seconds)
    name = "dump from a cold dataset: the loop waits for boards"
    return [Figure(name, statistics.median(waits), None, "%", None, "< 5")]


def measure_scan(root: Path, options: argparse.Namespace) -> list[Figure]:
    """Find rows by a filter, against reading the files and NumPy on mappings of them."""
    directory = make_dataset(root / "sparse", int(options.sparse_gb * 1e9 / ROW.itemsize), 8)
    figures = []
    for state, prepare in (("warm", warm), ("cold", chill)):
        ours, bare, other = rounds(
            [np.empty(0)] * options.rounds,
            lambda _, prepare=prepare: time_scan(directory, prepare),
            lambda _, prepare=prepare: time_bare_scan(directory, prepare),
            lambda _, prepare=prepare: time_numpy_scan(directory, prepare),
        )
        name = f"{state}, {options.sparse_gb:g} GB: scan for max_rank >= 11"
        figures.append(compare(f"{name}, against reading all bytes", ours, bare, ">= 0.8"))
        figures.append(compare(f"{name}, against NumPy", ours, other, ">= 3"))
    return figures


def time_scan(directory: Path, prepare: Callable) -> float:
    dataset = StepsDataset(directory)
    prepare(directory)
    return seconds(lambda: dataset.matches("max_rank >= 11"))


def time_bare_scan(directory: Path, prepare: Callable) -> float:
    """Return the seconds to read all files, a mebibyte a call, on all cores."""
    pieces = [
        (path, start)
        for path in sorted(directory.iterdir())
        for start in range(0, path.stat().st_size, 16 << 20)
    ]

    def read(piece: tuple[Path, int]) -> None:
        path, start = piece
        buffer = buffers.get()
        with path.open("rb", buffering=0) as file:
            for offset in range(start, start + (16 << 20), 1 << 20):
                os.preadv(file.fileno(), [buffer], offset)
        buffers.put(buffer)

    prepare(directory)
    cores = len(os.sched_getaffinity(0))
    buffers: queue.SimpleQueue[bytearray] = queue.SimpleQueue()
    for _ in range(cores):
        buffers.put(bytearray(1 << 20))
    with ThreadPoolExecutor(cores) as executor:
        return seconds(lambda: list(executor.map(read, pieces)))


def time_numpy_scan(directory: Path, prepare: Callable) -> float:
    shards = open_shards(directory)
    prepare(directory)
    return seconds(lambda: [shard["max_rank"] >= 11 for shard in shards])


def measure_labels(root: Path, options: argparse.Namespace) -> list[Figure]:
    """Dump with all labels and without, and count what both read of a cold dataset."""
    directory = make_dataset(root / "sparse", int(options.sparse_gb * 1e9 / ROW.itemsize), 8)
    warm(directory)

    def dump_seconds(seed: int, labels: str) -> float:
        return dump(
            DEMO / "checkpoint",
            directory,
            root / "labels.safetensors",
            outputs=["final_hidden"],
            steps=slice(seed * 65_536, (seed + 1) * 65_536),
            labels=labels,
            device="cpu",
            allow_cpu=True,
        ).seconds

    dump_seconds(0, "all")
    with_labels, without = rounds(
        list(range(options.rounds)),
        lambda seed: dump_seconds(seed, "all"),
        lambda seed: dump_seconds(seed, ""),
    )
    figures = [compare("dump with all labels, against without", with_labels, without, ">= 0.97")]
    indices = draw(directory, options.cold_boards, 0)
    dataset = StepsDataset(directory)
    read = []
    for action in (
        lambda: dataset.read_labels(indices, "all"),
        lambda: dataset.read_boards(indices),
    ):
        chill(directory)
        before = bytes_from_disk()
        action()
        read.append((bytes_from_disk() - before) / 1e6)
    name = f"cold: read of {options.cold_boards:.0e} rows with all labels, boards alone"
    return [*figures, Figure(name, read[0], read[1], "MB", read[1] / read[0], ">= 0.97")]


def bytes_from_disk() -> int:
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])


MEASURES = {
    "open": measure_open,
    "sample": measure_sample,
    "memory": measure_memory,
    "warm": measure_warm,
    "cold": measure_cold,
    "feed": measure_feed,
    "scan": measure_scan,
    "labels": measure_labels,
}

if __name__ == "__main__":
    main()
