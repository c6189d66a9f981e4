"""Datasets opened, sampled and read, against plain NumPy.

"Dense" rows lie a few kilobytes apart, "sparse" ones further. "Warm" means that the page cache
holds the dataset, "cold" that it holds none of it, which is checked. Each round has its own sample,
the same for all contenders.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
from baseline import decode_boards, gather_rows, open_shards
from limits import drop_from_cache, read_raw, warm
from measure import Figure, Section, compare, timed
from setting import BENCHMARKS, Setting
from workload import WAITING, Workload

from dump_activations import StepsDataset, demo

_ROW = StepsDataset(demo.DATASET).dtype  # 46 bytes
_SHARDS = 10_000
_DENSE_ROWS = 40_000_000
_BOARDS, _COLD_BOARDS = 1_000_000, 20_000
_BATCH, _WINDOW = 1024, 1 << 20  # A dump reads a window in one call.
_OURS, _NUMPY = "package", "NumPy"

Prepare = Callable[[Path], None]


def _dataset(directory: Path, rows: int, shards: int, *, empty: bool = False) -> Path:
    """Write random rows, a million repeated, unless they are there. Empty ones take no space."""
    if directory.exists():
        return directory
    directory.mkdir(parents=True)
    length = rows // shards
    block = b"" if empty else np.random.default_rng(0).bytes(min(10**6, length) * _ROW.itemsize)
    header = {"descr": _ROW.descr, "fortran_order": False, "shape": (length,)}
    for shard in range(shards):
        with (directory / f"steps-{shard:05}.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            end = file.tell() + length * _ROW.itemsize
            while block and file.tell() < end:
                file.write(block[: end - file.tell()])
            file.truncate(end)
    return directory


def _empty(setting: Setting) -> Path:
    return _dataset(setting.scratch / "empty", _SHARDS * 10**6, _SHARDS, empty=True)


def _dense(setting: Setting) -> Path:
    return _dataset(setting.scratch / "dense", _DENSE_ROWS, 4)


def _sparse(setting: Setting) -> Path:
    return _dataset(setting.scratch / "sparse", int(setting.gigabytes * 1e9 / _ROW.itemsize), 8)


def _warm(directory: Path) -> None:
    for path in directory.iterdir():
        warm(path)


def _chill(directory: Path) -> None:
    for path in directory.iterdir():
        drop_from_cache(path)


def _compare(
    rounds: int, name: str, contenders: Mapping[str, Callable[[int], float]], **at_least: float
) -> list[Figure]:
    """Compare seconds. Contenders take the number of the round, and the first is the package.

    `at_least` bounds the ratio of a contender to the package.
    """
    numbers = {each: count() for each in contenders}
    measured = compare(
        {each: lambda each=each: contenders[each](next(numbers[each])) for each in contenders},
        rounds=rounds,
    )
    figures = [Figure.of(f"{name}: {each}", values, "s") for each, values in measured.items()]
    ours, *others = contenders
    for other in others:
        target = {"at_least": at_least[other]} if other in at_least else {}
        title = f"{name}: {other} to {ours}"
        figures.append(measured.ratio(other, ours, title=title, **target))
    return figures


def _reads(
    directory: Path, n: int, window: int, batch: int, prepare: Prepare
) -> dict[str, Callable[[int], float]]:
    """Return the contenders of a read of n boards from a dataset and mappings just opened."""

    def ours(seed: int) -> float:
        dataset = StepsDataset(directory)
        indices = dataset.sample_indices(n, seed=seed)
        prepare(directory)
        return timed(partial(_read_windows, dataset, indices, window))

    def numpy(seed: int) -> float:
        indices = StepsDataset(directory).sample_indices(n, seed=seed)
        shards = open_shards(directory)
        prepare(directory)
        return timed(partial(_read_batches, shards, indices, batch))

    return {_OURS: ours, _NUMPY: numpy}


def _read_windows(dataset: StepsDataset, indices: np.ndarray, window: int) -> None:
    for start in range(0, len(indices), window):
        dataset.read_boards(indices[start : start + window])


def _read_batches(shards: list[np.ndarray], indices: np.ndarray, batch: int) -> None:
    for start in range(0, len(indices), batch):
        decode_boards(gather_rows(shards, indices[start : start + batch]))


def measure_open(setting: Setting) -> Section:
    """Open many shards, also where a process may open few files."""
    directory = _empty(setting)

    def limited(_: int) -> float:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        try:
            return timed(partial(StepsDataset, directory))
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    def mappings(_: int) -> float:
        paths = sorted(directory.iterdir())
        return timed(lambda: [np.load(path, mmap_mode="r") for path in paths])

    ours = {_OURS: lambda _: timed(partial(StepsDataset, directory))}
    contenders = {**ours, "ulimit -n 256": limited, _NUMPY: mappings}
    figures = _compare(setting.rounds, "open", contenders, NumPy=5)
    return Section("Datasets, opened", f"{_SHARDS:,} shards", figures)


_PROGRAM = """
import json, time
from pathlib import Path
import numpy as np
from dump_activations import StepsDataset
from dump_activations.dataset.sampling import sample

def peak_mb():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000

np.random.default_rng(0).choice(100, 10, replace=False)
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before, started = peak_mb(), time.perf_counter()
{call}
print(json.dumps([time.perf_counter() - started, peak_mb() - before]))
"""


def _alone(call: str) -> tuple[float, float]:
    """Run a call in its own process: its seconds, and the MB that it adds to the peak."""
    program = [sys.executable, "-c", _PROGRAM.format(call=call)]
    seconds, peak = json.loads(subprocess.check_output(program))
    return seconds, peak


def measure_sample(setting: Setting) -> Section:
    """Sample many indices, and from many rows."""
    figures = []
    for rows, n, times, faster in (
        (10**9, 21_000_000, 1, 2),
        (10**10, 1_000_000, setting.rounds, 1),
    ):
        calls = {
            _OURS: f"sample({rows}, {n}, 0)",
            _NUMPY: f"np.random.default_rng(0).choice({rows}, {n}, replace=False)",
        }
        name = f"sample {n:.3g} of {rows:.0e}"
        contenders = {each: lambda _, call=call: _alone(call)[0] for each, call in calls.items()}
        figures += _compare(times, name, contenders, NumPy=faster)
        peak = _alone(calls[_OURS])[1]
        figures.append(Figure.of(f"{name}: peak memory", [peak], "MB", at_most=1000))
    return Section("Datasets, sampled", "each in its own process", figures)


def measure_memory(setting: Setting) -> Section:
    """Weigh the opening of many rows, a sample and its read."""
    dataset = f"dataset = StepsDataset({str(_empty(setting))!r})"
    _, peak = _alone(f"{dataset}\ndataset.read_boards(dataset.sample_indices(1_000_000))")
    figure = Figure.of("open, sample and read 1e6: peak memory", [peak], "MB", at_most=200)
    return Section("Datasets, memory", f"{_SHARDS * 1e6:.0e} rows", [figure])


def measure_warm(setting: Setting) -> Section:
    """Read many boards in one call, and in windows against batches, on fresh mappings."""
    figures = []
    sizes = {"in one call": (_BOARDS, _BOARDS), "as a dump reads them": (_WINDOW, _BATCH)}
    for kind, directory, faster in (
        ("dense", _dense(setting), 5),
        ("sparse", _sparse(setting), 3),
    ):
        for way, (window, batch) in sizes.items():
            contenders = _reads(directory, _BOARDS, window, batch, _warm)
            figures += _compare(setting.rounds, f"{kind}, {way}", contenders, NumPy=faster)
    lone = _lone_calls(setting, _dense(setting))
    return Section("Datasets, warm", f"{_BOARDS:,} boards", [*figures, *lone])


def _lone_calls(setting: Setting, directory: Path) -> list[Figure]:
    """Read 1,024 rows once from a dataset just opened, and again from one in use."""
    fresh = _reads(directory, _BATCH, _BATCH, _BATCH, _warm)
    first = _compare(10 * setting.rounds, "1,024 rows in a lone call", fresh, NumPy=1.5)
    dataset, shards = StepsDataset(directory), open_shards(directory)
    _read_batches(shards, dataset.sample_indices(_BOARDS), _BATCH)

    def sample(seed: int) -> np.ndarray:
        return dataset.sample_indices(_BATCH, seed=seed)

    used = {
        _OURS: lambda seed: timed(partial(_read_windows, dataset, sample(seed), _BATCH)),
        _NUMPY: lambda seed: timed(partial(_read_batches, shards, sample(seed), _BATCH)),
    }
    return first + _compare(10 * setting.rounds, "1,024 rows, all pages mapped", used)


def measure_cold(setting: Setting) -> Section:
    """Read boards from the disk, against mappings and a bare loop of reads."""
    directory = _sparse(setting)
    contenders = {
        **_reads(directory, _COLD_BOARDS, _COLD_BOARDS, _BATCH, _chill),
        "bare": partial(_read_bare, setting, directory),
    }
    figures = _compare(setting.rounds, "boards", contenders, NumPy=20, bare=0.7)
    return Section("Datasets, cold", f"{_COLD_BOARDS:,} boards", figures)


def _read_bare(setting: Setting, directory: Path, seed: int) -> float:
    """Seconds to read the rows' boards on 64 threads and do nothing with them."""
    dataset = StepsDataset(directory)
    shards = dataset.shards
    firsts = np.array([shard.first for shard in shards])
    headers = np.array([shard.path.stat().st_size - shard.rows * _ROW.itemsize for shard in shards])
    ordered = np.sort(dataset.sample_indices(_COLD_BOARDS, seed=seed))
    shard = np.searchsorted(firsts, ordered, side="right") - 1
    offset = headers[shard] + (ordered - firsts[shard]) * _ROW.itemsize + _ROW.fields["board"][1]
    plan = setting.scratch / "plan.bin"
    np.stack([shard, offset], axis=1).astype("<u8").tofile(plan)
    _chill(directory)
    cargo = ["cargo", "run", "--quiet", "--release", "--example", "bare_reads", "--"]
    program = [*cargo, "14", plan, *(shard.path for shard in shards)]
    return float(subprocess.check_output(program, cwd=BENCHMARKS, text=True))


def measure_feed(setting: Setting) -> Section:
    """Dump the demo checkpoint on CPU from a cold dataset, and see if its loop waits."""
    directory = _sparse(setting)

    work = Workload(setting=setting, keys="final_hidden", boards=65_536, dataset=directory)

    def waiting(seed: int) -> float:
        _chill(directory)
        return work.dump_figures(write=False, seed=seed)[WAITING]

    shares = [waiting(seed) for seed in range(setting.rounds)]
    figure = Figure.of(WAITING, shares, "x", at_most=0.05)
    return Section("Datasets, fed", "a dump from a cold dataset", [figure])


def measure_scan(setting: Setting) -> Section:
    """Find rows by a filter, against reading the files and NumPy on mappings of them."""
    directory = _sparse(setting)

    def scan(prepare: Prepare, _: int) -> float:
        dataset = StepsDataset(directory)
        prepare(directory)
        return timed(lambda: dataset.matches("max_rank >= 11"))

    def scan_numpy(prepare: Prepare, _: int) -> float:
        shards = open_shards(directory)
        prepare(directory)
        return timed(lambda: [shard["max_rank"] >= 11 for shard in shards])

    def read_all(prepare: Prepare, _: int) -> float:
        prepare(directory)
        return sum(read_raw(path, len(os.sched_getaffinity(0))) for path in directory.iterdir())

    figures = []
    for state, prepare in (("warm", _warm), ("cold", _chill)):
        contenders = {
            _OURS: partial(scan, prepare),
            "bare": partial(read_all, prepare),
            _NUMPY: partial(scan_numpy, prepare),
        }
        figures += _compare(setting.rounds, f"{state} scan", contenders, bare=0.8, NumPy=3)
    return Section("Datasets, scanned", f"{setting.gigabytes:g} GB, max_rank >= 11", figures)


def measure_labels(setting: Setting) -> Section:
    """Dump with all labels and without, and count the bytes that both read of a cold dataset."""
    directory = _sparse(setting)
    _warm(directory)

    work = Workload(setting=setting, keys="final_hidden", dataset=directory)

    def seconds(labels: str, number: int) -> float:
        steps = slice(number * 65_536, (number + 1) * 65_536)
        return work.dump(steps=steps, labels=labels).seconds

    contenders = {"all labels": partial(seconds, "all"), "none": partial(seconds, "")}
    figures = _compare(setting.rounds, "dump", contenders, none=0.97)
    dataset = StepsDataset(directory)
    indices = dataset.sample_indices(_COLD_BOARDS)
    for name, read in {
        "all labels": lambda: dataset.read_labels(indices, "all"),
        "boards alone": lambda: dataset.read_boards(indices),
    }.items():
        _chill(directory)
        before = _bytes_from_disk()
        read()
        figures.append(Figure.of(f"cold: {name}", [(_bytes_from_disk() - before) / 1e6], "MB"))
    return Section("Datasets, labels", f"{_COLD_BOARDS:,} cold boards", figures)


def _bytes_from_disk() -> int:
    return int(Path("/proc/self/io").read_text().split("read_bytes: ")[1].split()[0])
