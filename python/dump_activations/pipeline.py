"""The loop that joins the stages: `dump` writes a file, `stream` hands out batches."""

import os
import re
import time
import warnings
import zlib
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dump_activations.dataset import StepsDataset
from dump_activations.encoder import Encoder
from dump_activations.errors import (
    DeviceError,
    DumpActivationsWarning,
    InvalidArgumentError,
    OutputError,
    VocabularyError,
)
from dump_activations.feed import BoardBatch
from dump_activations.interrupts import HeldInterrupts, ignored_interrupts
from dump_activations.loop import Loop, Progress, Summary
from dump_activations.options import (
    DEFAULT_BATCH_SIZE,
    DEFAULT_DEVICE,
    DEFAULT_DTYPE,
    DEFAULT_OUTPUT,
    DEFAULT_OUTPUTS,
    DEFAULT_PRECISION,
    DEFAULT_SAMPLES,
    DEFAULT_SEED,
    STORAGE_DTYPES,
    Options,
)
from dump_activations.output.digest import Digest
from dump_activations.output.file import OutputFile
from dump_activations.output.partial import check_output
from dump_activations.output.writers import WriterPool
from dump_activations.transfer import HostBatch
from dump_activations.work import Work, prepare, warn_of_large_tensors

_OUT_OF_MEMORY = re.compile("out of memory|can't allocate memory")
# Enough for some to wait for the disk while others take checksums.
_WRITER_THREADS = min(8, max(2, (os.cpu_count() or 4) // 2))


def dump(
    init_or_model: str | os.PathLike[str] | Encoder,
    dataset_or_path: str | os.PathLike[str] | StepsDataset,
    output: str | os.PathLike[str] = DEFAULT_OUTPUT,
    *,
    outputs: str | Sequence[str] = DEFAULT_OUTPUTS,
    n_samples: int = DEFAULT_SAMPLES,
    indices: ArrayLike | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    seed: int = DEFAULT_SEED,
    dtype: str = DEFAULT_DTYPE,
    device: str = DEFAULT_DEVICE,
    write: bool = True,
    allow_cpu: bool = False,
    random_init: bool = False,
    precision: str = DEFAULT_PRECISION,
    compile: bool = False,  # noqa: A002 -- the flag's name
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Run boards through a model and write the asked-for activations to one file.

    Args:
        init_or_model: a checkpoint directory, `.pt` bundle or `hf://org/repo[/subdir][@revision]`;
            or a loaded Encoder, which is moved to the device.
        dataset_or_path: a steps dataset, or its directory.
        output: the file to write; its suffix, `.safetensors`, `.pt` or `.npz`, is its format.
        outputs: activation keys, or one comma-separated string of them.
        n_samples: how many steps to draw; ignored if `indices` are given.
        indices: global step indices of any integer dtype and shape, flattened; order is kept and
            duplicates are allowed.
        batch_size: boards a forward pass.
        seed: of the draw; the indices are those of `numpy.random.default_rng(seed)`.
        dtype: storage dtype of floating tensors: `fp32`, `fp16` or `bf16`.
        device: `cuda`, `cuda:N`, or `cpu` with `allow_cpu`.
        write: False runs the model and discards the activations.
        allow_cpu: accept a device that is not CUDA.
        random_init: untrained weights in the checkpoint's architecture, as a control.
        precision: arithmetic of the forward pass: `fp32`, `tf32` (on CUDA) or `bf16`.
        compile: run the model through `torch.compile`.
        resume: go on with the partial file that an interrupted run of the same work left.
        overwrite: drop such a partial file.
        progress: called after each batch.

    Returns:
        What was done, and how long each stage was busy.

    Raises:
        DumpActivationsError: with one line that names what is wrong and the way out. No file of
            the target's name appears then, and one that was there is left as it was.
    """
    started = time.perf_counter()
    if resume and overwrite:
        raise InvalidArgumentError("--resume: contradicts --overwrite; leave out one of them")
    options = Options(
        outputs=outputs,
        n_samples=n_samples if indices is None else None,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
        allow_cpu=allow_cpu,
        random_init=random_init,
        precision=precision,
        compile=compile,
    )
    path = Path(output)
    if write:
        check_output(path, [STORAGE_DTYPES[dtype]])
    with _shortage_named(batch_size):
        work = prepare(init_or_model, dataset_or_path, options=options, indices=indices)
        if not write:
            return _discard(work, progress, started)
        return _write(work, path, progress, started, resume=resume, overwrite=overwrite)


@contextmanager
def _shortage_named(batch_size: int) -> Iterator[None]:
    """Turn what torch raises for want of memory, on the device or the host, into one error."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(str(error)):
            raise
        notes = getattr(error, "__notes__", [])
        where = "CUDA out of memory" if "CUDA" in str(error) else "out of memory"
        smaller = f"--batch-size {max(batch_size // 2, 1)}{' --overwrite' if notes else ''}"
        named = DeviceError(f"{where} at --batch-size {batch_size}; free some, or try {smaller}")
        for note in notes:
            named.add_note(note)
        raise named from error


def _write(
    work: Work,
    path: Path,
    progress: Progress | None,
    started: float,
    *,
    resume: bool,
    overwrite: bool,
) -> Summary:
    specs = work.tensor_specs()
    warn_of_large_tensors(specs)
    batched = [*work.board_shapes, "boards"]
    with HeldInterrupts() as interrupts:
        file = OutputFile.open(
            path,
            specs,
            work.metadata(),
            batched=batched,
            batch_rows=work.options.batch_size,
            fingerprint=work.fingerprint(),
            resume=resume,
            overwrite=overwrite,
        )
        with file:
            _check_resumed_boards(file, work)
            with _kept_or_discarded(file, len(work.indices)):
                for name, tensor in work.whole_tensors().items():
                    file.write(name, 0, _bytes_of(tensor))
                with (
                    Loop(work) as loop,
                    WriterPool(file, threads=_WRITER_THREADS) as writers,
                    closing(loop.batches(progress, start=file.resumed_rows)) as batches,
                ):
                    for batch in batches:
                        host = loop.to_host()
                        slices = {"boards": batch.boards_BS, **host.tensors}
                        writers.submit(
                            batch.first_row,
                            {name: _bytes_of(tensor) for name, tensor in slices.items()},
                            parts=host.parts,
                            done=host.release,
                        )
                        interrupts.check()
                digests = file.commit()
                interrupts.check()
    nonfinite = _nonfinite(digests)
    return loop.summary(
        started,
        output=path,
        resumed_boards=file.resumed_rows,
        bytes_written=file.size,
        write_seconds=writers.busy_seconds,
        nonfinite=nonfinite,
    )


def _check_resumed_boards(file: OutputFile, work: Work) -> None:
    """Refuse to go on where the pool's rows are no longer those of the batch resumed last."""
    last = file.last_resumed
    if last is None:
        return
    first_row, digests = last
    boards = work.dataset.read_boards(work.indices[first_row : file.resumed_rows])
    if zlib.crc32(boards.data) != digests["boards"].crc32:
        raise OutputError(
            f"{file.partial} holds other boards than {work.dataset.path} has now; restore the "
            "pool, or drop the file with --overwrite"
        )


def _nonfinite(digests: Mapping[str, Digest]) -> dict[str, dict[str, int]]:
    """Count what is not finite in each tensor that has any, with a warning for each."""
    counts = {
        name: {"nan": digest.nan, "inf": digest.inf}
        for name, digest in digests.items()
        if digest.nan or digest.inf
    }
    for name, count in counts.items():
        warnings.warn(
            f"{name}: {count['nan']:,} NaN and {count['inf']:,} infinite values were stored; "
            "infinite ones come from an overflow where --dtype is fp16",
            DumpActivationsWarning,
            stacklevel=4,
        )
    return counts


@contextmanager
def _kept_or_discarded(file: OutputFile, boards: int) -> Iterator[None]:
    """Leave a state to resume where the run could be finished later, and nothing where not."""
    try:
        yield
    except VocabularyError:
        file.discard()
        raise
    except BaseException as error:
        if file.is_committed:
            error.add_note(f"{file.target} is complete")
            raise
        with ignored_interrupts():
            kept = file.suspend()
        if kept:
            error.add_note(
                f"{kept:,} of {boards:,} boards are kept in {file.partial}; the same command with "
                "--resume does the rest"
            )
        raise


def _discard(work: Work, progress: Progress | None, started: float) -> Summary:
    with HeldInterrupts() as interrupts, Loop(work) as loop:
        for _ in loop.batches(progress):
            interrupts.check()
    return loop.summary(started)


@dataclass(frozen=True)
class Batch:
    """Activations of consecutive boards of a run. All tensors lie on the host and are the caller's.

    Attributes:
        first_row: place of the first board in the run.
        indices: global step indices, int64 (B,).
        boards: exponents, uint8 (B, 16).
        tensors: activation key -> tensor (B, *shape) in the storage dtype; and the parameters that
            were asked for, by their names in a file.
    """

    first_row: int
    indices: Tensor
    boards: Tensor
    tensors: dict[str, Tensor]

    def __getitem__(self, key: str) -> Tensor:
        """Return one tensor by its key."""
        return self.tensors[key]


def stream(
    init_or_model: str | os.PathLike[str] | Encoder,
    dataset_or_path: str | os.PathLike[str] | StepsDataset,
    *,
    outputs: str | Sequence[str] = DEFAULT_OUTPUTS,
    n_samples: int = DEFAULT_SAMPLES,
    indices: ArrayLike | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    seed: int = DEFAULT_SEED,
    dtype: str = DEFAULT_DTYPE,
    device: str = DEFAULT_DEVICE,
    allow_cpu: bool = False,
    random_init: bool = False,
    precision: str = DEFAULT_PRECISION,
    compile: bool = False,  # noqa: A002 -- the flag's name
) -> Iterator[Batch]:
    """Run boards through a model and yield the asked-for activations, a batch at a time.

    Everything is loaded and checked before the call returns. On a GPU the next batch is computed
    while the caller works on the one before it. The arguments and errors are those of `dump`.
    """
    options = Options(
        outputs=outputs,
        n_samples=n_samples if indices is None else None,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        device=device,
        allow_cpu=allow_cpu,
        random_init=random_init,
        precision=precision,
        compile=compile,
    )
    with _shortage_named(batch_size):
        work = prepare(init_or_model, dataset_or_path, options=options, indices=indices)
    return _interruptible(_stream(work), batch_size)


def _interruptible(batches: Generator[Batch, None, None], batch_size: int) -> Iterator[Batch]:
    """Hand on the batches; an interruption between two of them ends the run in order."""
    with closing(batches):
        while True:
            with HeldInterrupts(), _shortage_named(batch_size):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


def _stream(work: Work) -> Generator[Batch, None, None]:
    # The CPU is the caller's between two batches.
    ahead = 1 if work.device.type == "cuda" else 0
    under_way: deque[tuple[BoardBatch, HostBatch]] = deque()
    with Loop(work) as loop:
        for batch in loop.batches():
            under_way.append((batch, loop.to_host()))
            if len(under_way) > ahead:
                yield _take(work, *under_way.popleft())
        while under_way:
            yield _take(work, *under_way.popleft())


def _take(work: Work, batch: BoardBatch, host: HostBatch) -> Batch:
    for part in host.parts:
        part.wait()
    tensors = {key: tensor.clone() for key, tensor in host.tensors.items()}
    host.release()
    weights = {n: tensor.to(work.storage_dtype, copy=True) for n, tensor in work.weights.items()}
    return Batch(
        batch.first_row,
        torch.from_numpy(batch.indices.copy()),
        batch.boards_BS.clone(),
        tensors | weights,
    )


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """View a contiguous host tensor as its bytes, uint8 (nbytes,)."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
