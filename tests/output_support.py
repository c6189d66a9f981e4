"""Small dumps, known byte for byte, for the tests of the writer. Imports no torch."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from dump_activations.dtypes import DTYPES, TensorSpec
from dump_activations.storage.writing.output import OutputFile
from dump_activations.storage.writing.paths import check_output, target_of
from dump_activations.storage.writing.shards import Output
from dump_activations.storage.writing.work import Work
from dump_activations.storage.writing.writers import Writers

SUFFIXES = (".safetensors", ".pt", ".npz")


@dataclass(frozen=True)
class Dump:
    """The content of a dump: bytes of every tensor, and the names of those in batches."""

    specs: Sequence[TensorSpec]
    data: Mapping[str, np.ndarray]
    batched: Sequence[str]
    batch_rows: int
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return next(spec.shape[0] for spec in self.specs if spec.name in self.batched)

    @property
    def first_rows(self) -> range:
        return range(0, self.rows, self.batch_rows)

    def batch(self, first_row: int) -> dict[str, np.ndarray]:
        """Return the slices of the batch at `first_row`."""
        by_name = {spec.name: spec for spec in self.specs}
        stop = min(first_row + self.batch_rows, self.rows)
        return {
            name: self.data[name][first_row * row : stop * row]
            for name in self.batched
            for row in [by_name[name].row_nbytes]
        }


def make_dump(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    batched: Sequence[str],
    batch_rows: int,
    metadata: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Dump:
    """Fill tensors, name -> (dtype, shape), with random bytes."""
    generator = np.random.default_rng(seed)
    specs = [TensorSpec(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    data = {spec.name: generator.integers(0, 256, spec.nbytes, dtype=np.uint8) for spec in specs}
    return Dump(specs, data, batched, batch_rows, metadata or {})


def small_dump(rows: int = 23, batch_rows: int = 4) -> Dump:
    """Return a dump of a few kilobytes that every format can hold."""
    return make_dump(
        {
            "pooled": ("float16", (rows, 7)),
            "hidden": ("float32", (rows, 3, 5)),
            "indices": ("int64", (rows,)),
            "boards": ("uint8", (rows, 16)),
            "gammas/final_ln": ("float32", (9,)),
        },
        batched=["pooled", "hidden", "boards"],
        batch_rows=batch_rows,
        metadata={"checkpoint": "somewhere", "seed": "0"},
    )


def open_file(path: Path, dump: Dump, *, inputs: Sequence[Path] = (), **options: Any) -> OutputFile:
    """Open the file of a dump as one process does. Leaving its context suspends it."""
    check_output(path, [spec.dtype for spec in dump.specs], inputs=inputs)
    target_of(path).parent.mkdir(parents=True, exist_ok=True)
    file = open_output(path, dump, **options).take()
    assert file is not None
    return file


def open_output(
    path: Path,
    dump: Dump,
    *,
    identity: str = "work",
    shards: int | None = None,
    **options: Any,
) -> Output:
    work = work_of(path, dump, identity=identity)
    return Output(work.files(shards), **options)


def work_of(path: Path, dump: Dump, *, identity: str = "work") -> Work:
    return Work(
        target_of(path),
        dump.specs,
        dump.batched,
        dump.batch_rows,
        dump.metadata,
        computed_by={"device": "abacus", "threads": "1"},
        identity={"work": identity, **dump.metadata},
    )


def write_whole_tensors(file: OutputFile, dump: Dump) -> None:
    for name in dump.data.keys() - set(dump.batched):
        file.write(name, dump.data[name])


def write_batches(
    file: OutputFile, dump: Dump, first_rows: Iterable[int], *, threads: int = 2
) -> None:
    """Write the batches at these rows of the run."""
    with Writers(lambda _: None, threads=threads) as writers:
        for first_row in first_rows:
            batch = first_row // dump.batch_rows - file.work.run_batches.start
            writers.submit(file, batch, dump.batch(first_row), done=lambda: None)


def missing_rows(file: OutputFile) -> list[int]:
    """List the first row of each missing batch, as the run numbers rows."""
    start, size = file.work.run_batches.start, file.work.work.batch_rows
    return [(start + batch) * size for each in file.missing for batch in each]


def finish(
    file: OutputFile, dump: Dump, *, order: Sequence[int] | None = None, threads: int = 2
) -> None:
    """Write all that a file misses, with the batches in `order`, and commit it."""
    write_whole_tensors(file, dump)
    missing = missing_rows(file)
    write_batches(file, dump, [row for row in order or missing if row in missing], threads=threads)
    file.commit()


def write_dump(
    path: Path,
    dump: Dump,
    *,
    order: Sequence[int] | None = None,
    threads: int = 2,
    **options: Any,
) -> Path:
    """Write a dump in one file, or the rest of it."""
    with open_file(path, dump, **options) as file:
        finish(file, dump, order=order, threads=threads)
    return path


def write_shards(path: Path, dump: Dump, shards: int | None, **options: Any) -> list[int]:
    """Write the files of a dump as one process does, and return the numbers of its shards."""
    numbers = []
    with open_output(path, dump, shards=shards, **options) as output:
        while (file := output.next()) is not None:
            write_whole_tensors(file, dump)
            write_batches(file, dump, missing_rows(file))
            output.commit(file)
            numbers.append(0 if file.work.shard is None else file.work.shard.number)
    return numbers


def interrupt(target: Path, dump: Dump, first_rows: Iterable[int], *, threads: int = 2) -> None:
    """Leave a dump of which only these batches are written."""
    with open_file(target, dump) as file:
        write_whole_tensors(file, dump)
        write_batches(file, dump, first_rows, threads=threads)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@contextmanager
def no_new_descriptors() -> Iterator[None]:
    """Check that a block closes all the files that it opens."""
    before = os.listdir("/proc/self/fd")  # noqa: PTH208 - names are compared
    yield
    assert os.listdir("/proc/self/fd") == before  # noqa: PTH208


@st.composite
def dumps(draw: st.DrawFn, dtypes: Sequence[str] = tuple(DTYPES)) -> Dump:
    """Draw a dump: names, dtypes, shapes, batch size and metadata."""
    rows = draw(st.integers(1, 40))
    names = st.from_regex(r"[a-z][a-z0-9_]{0,8}(/[a-z0-9_.]{1,12}[a-z])?", fullmatch=True)
    names = names.filter(lambda name: name != "metadata")
    chosen = draw(st.lists(names, min_size=1, max_size=5, unique=True))
    batched = chosen[: draw(st.integers(1, len(chosen)))]
    tensors = {}
    for name in chosen:
        trailing = draw(st.lists(st.integers(1, 6), max_size=3))
        first = rows if name in batched else draw(st.integers(1, 5))
        tensors[name] = (draw(st.sampled_from(dtypes)), (first, *trailing))
    metadata = draw(st.dictionaries(st.text(), st.text(), max_size=4))
    metadata.pop("integrity", None)
    return make_dump(
        tensors,
        batched=batched,
        batch_rows=draw(st.integers(1, rows + 1)),
        metadata=metadata,
        seed=draw(st.integers(0, 100)),
    )
