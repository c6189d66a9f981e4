"""A run and its file: what `dump` does."""

import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dump_activations.api.sources import Init, Pool
from dump_activations.dtypes import STORAGE_DTYPES
from dump_activations.errors import (
    Note,
    OutputError,
    VocabularyError,
    note,
    option,
    switch,
    warn,
)
from dump_activations.options import DumpOptions, Progress
from dump_activations.phases import Phase, begin, counted
from dump_activations.pipeline.board_feed import LABEL_PREFIX, read_batch
from dump_activations.pipeline.device import current
from dump_activations.pipeline.forward import Forward
from dump_activations.pipeline.interrupts import HeldInterrupts, ignored_interrupts
from dump_activations.pipeline.loop import Loop
from dump_activations.pipeline.plan import Plan, make_plan, warn_of_large_tensors
from dump_activations.pipeline.preview import Preview
from dump_activations.pipeline.provenance import fingerprint, metadata
from dump_activations.pipeline.shortage import batch_shortage_named
from dump_activations.pipeline.summary import Summary
from dump_activations.pipeline.transfer import HOST_SLOTS
from dump_activations.progress.display import shown_progress
from dump_activations.storage.digests import Digest
from dump_activations.storage.writing.outlook import outlook
from dump_activations.storage.writing.output_file import OutputFile
from dump_activations.storage.writing.partial import tidy
from dump_activations.storage.writing.room import check_room, free_space
from dump_activations.storage.writing.targets import check_output, partial_path
from dump_activations.storage.writing.work import Existing, Work, find_existing
from dump_activations.storage.writing.writers import WriterPool
from dump_activations.units import size_text

# Enough for some to wait for the disk while others take checksums.
_WRITER_THREADS = min(8, max(2, (os.cpu_count() or 4) // 2))


def preview(init: Init, pool: Pool, path: Path, options: DumpOptions) -> Preview:
    """Check what `dump` checks before its first forward pass, and say what it would write.

    Raises:
        DumpActivationsError: what `dump` would raise.
    """
    if options.write:
        check_output(path, [STORAGE_DTYPES[options.dtype].name])
    plan = make_plan(init, pool, options)
    if not options.write:
        return Preview.of(plan)
    previewed = Preview.of(plan, path, free_space(path))
    check_output(path, [STORAGE_DTYPES[options.dtype].name], inputs=plan.input_files)
    check_room(path, previewed.nbytes)
    work = _work(plan, path, options)
    for text in outlook(work, resume=options.resume, overwrite=options.overwrite):
        note(text)
    return previewed


def dump_to_file(init: Init, pool: Pool, path: Path, options: DumpOptions) -> Summary:
    """Write a run to a file, or run it without one."""
    started = time.perf_counter()
    if options.write:
        check_output(path, [STORAGE_DTYPES[options.dtype].name])
    showing = shown_progress() if options.progress is True else nullcontext()
    with showing, batch_shortage_named(options.batch_size):
        return _run(init, pool, path, options, started)


def _run(init: Init, pool: Pool, path: Path, options: DumpOptions, started: float) -> Summary:
    plan = make_plan(init, pool, options, host_slots=HOST_SLOTS if options.write else 0)
    with plan, current(plan.device):
        if not options.write:
            return _discard(plan, options, started)
        return _write(plan, path, options, started)


def _work(plan: Plan, path: Path, options: DumpOptions) -> Work:
    specs = plan.tensor_specs()
    return Work.of(
        path,
        specs,
        metadata(plan),
        batched=[spec.name for spec in specs if not plan.is_whole(spec.name)],
        batch_rows=options.batch_size,
        fingerprint=fingerprint(plan),
    )


def _write(plan: Plan, path: Path, options: DumpOptions, started: float) -> Summary:
    work = _work(plan, path, options)
    existing = find_existing(work.target)
    if options.resume and existing and existing.is_of(work):
        tidy(work.target)
        note(f"{path} is complete already: there is nothing to do")
        if (partial := partial_path(work.target)).exists():
            note(f"{partial} is beside it, and stays: an unfinished dump of other work")
        return _nothing_done(plan, path, existing, started)
    warn_of_large_tensors(work.specs)
    previewed = Preview.of(plan, path, free_space(path))
    n = len(plan.indices)
    begin("preparing the file")
    with HeldInterrupts() as interrupts, Forward(plan) as forward:
        file = OutputFile.open(
            work,
            inputs=plan.input_files,
            overwrite=options.overwrite,
            check=interrupts.check,
        )
        with file:
            note(previewed.text)
            _check_resumed_boards(file, plan)
            for text in _beginning(file, existing, n):
                note(text)
            with _kept_or_discarded(file, n, overwrite=options.overwrite):
                for name, tensor in plan.whole_tensors().items():
                    file.write(name, _bytes_of(tensor))
                progress = _progress(plan, options, previewed, start=file.resumed_rows)
                if file.resumed_rows:
                    progress(file.resumed_rows, n)
                missing = [file.rows_of(stretch) for stretch in file.missing]
                start = missing[0].start if missing else n
                with (
                    Loop(plan, forward) as loop,
                    WriterPool(file, threads=_WRITER_THREADS) as writers,
                    closing(loop.batches(progress, start=start)) as batches,
                ):
                    for batch in batches:
                        if not any(batch.boards.first_row in rows for rows in missing):
                            batch.release()
                            continue
                        tensors = {**batch.boards.tensors, **batch.tensors}
                        writers.submit(
                            batch.boards.first_row,
                            {name: _bytes_of(tensor) for name, tensor in tensors.items()},
                            chunks=batch.chunks,
                            done=batch.release,
                        )
                        interrupts.check()
                begin("completing the file")
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


def _progress(
    plan: Plan, options: DumpOptions, previewed: Preview | None = None, *, start: int = 0
) -> Progress:
    """Go on to the boards; returns what is called with the boards done and the boards in all."""
    nbytes = previewed.nbytes if previewed else 0
    called = options.progress if callable(options.progress) else None
    phase = Phase("", "boards", start=start, of=len(plan.indices), nbytes=nbytes)
    return counted(phase, also=called)


def _beginning(file: OutputFile, existing: Existing | None, n: int) -> Iterator[str]:
    """Say what a run finds at its target and beside it."""
    if file.unusable:
        yield f"{file.partial} is started anew: {file.unusable}"
    if file.resumed_rows:
        yield f"going on with {file.partial}, which has {file.resumed_rows:,} of {n:,} boards"
    if existing:
        holds = size_text(existing.size)
        boards = existing.metadata.get("n_samples", "")
        if boards.isdecimal() and len(boards) < 20:
            holds += f", {int(boards):,} boards"
        yield f"{file.target} ({holds}) is replaced when the new file is whole"


def _nothing_done(plan: Plan, path: Path, existing: Existing, started: float) -> Summary:
    return Summary(
        output=path,
        boards=0,
        resumed_boards=len(plan.indices),
        bytes_written=existing.size,
        seconds=0.0,
        setup_seconds=time.perf_counter() - started,
        commit_seconds=0.0,
        stage_seconds=dict.fromkeys(("boards", "forward", "copy", "write"), 0.0),
        waiting_seconds=0.0,
        nonfinite=_counted(existing.digests),
    )


def _check_resumed_boards(file: OutputFile, plan: Plan) -> None:
    """Refuse to go on where the pool's rows are no longer those of the batch resumed last."""
    last = file.last_resumed
    if last is None:
        return
    rows, digests = last
    indices = plan.indices[rows.start : rows.stop]
    stored = read_batch(plan.pool, plan.labels, indices, first_row=rows.start).tensors
    if any(
        zlib.crc32(_bytes_of(each).data) != digests[name].crc32 for name, each in stored.items()
    ):
        raise OutputError(
            f"{file.partial} holds other boards than {plan.pool.path} has now; restore the "
            f"pool, or drop the file with {switch('overwrite')}"
        )


def _nonfinite(digests: Mapping[str, Digest]) -> dict[str, dict[str, int]]:
    """Count what is not finite in each tensor that has any, with a warning for each."""
    counts = {
        name: count
        for name, count in _counted(digests).items()
        # Labels are as the pool has them.
        if not name.startswith(LABEL_PREFIX)
    }
    for name, count in counts.items():
        warn(
            f"{name}: {count['nan']:,} NaN and {count['inf']:,} infinite values were stored; "
            f"infinite ones come from an overflow where {option('dtype')} is fp16"
        )
    return counts


def _counted(digests: Mapping[str, Digest]) -> dict[str, dict[str, int]]:
    return {
        name: {"nan": digest.nan, "inf": digest.inf}
        for name, digest in digests.items()
        if digest.nan or digest.inf
    }


@contextmanager
def _kept_or_discarded(file: OutputFile, boards: int, *, overwrite: bool) -> Iterator[None]:
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
            again = f"without {option('overwrite')}" if overwrite else "again"
            error.add_note(
                Note(
                    f"{kept:,} of {boards:,} boards are kept in {file.partial}; the same call "
                    f"{again} does the rest"
                )
            )
        raise


def _discard(plan: Plan, options: DumpOptions, started: float) -> Summary:
    with (
        HeldInterrupts() as interrupts,
        Forward(plan) as forward,
        Loop(plan, forward) as loop,
    ):
        for batch in loop.batches(_progress(plan, options)):
            batch.release()
            interrupts.check()
    return loop.summary(started)


def _bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """View a contiguous host tensor as its bytes, uint8 (nbytes,)."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
