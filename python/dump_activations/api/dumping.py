"""A run and its file: what `dump` does."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from dump_activations.api.remarks import (
    beginning,
    bytes_of,
    check_resumed_boards,
    nonfinite,
    nothing_done,
)
from dump_activations.api.same_work import check_same_work
from dump_activations.api.sources import Dataset, Init
from dump_activations.dtypes import STORAGE_DTYPES
from dump_activations.errors import GroupError, Note, VocabularyError, muted, note, option
from dump_activations.options import DumpOptions
from dump_activations.pipeline.device import current, shared_cores
from dump_activations.pipeline.forward import Forward
from dump_activations.pipeline.group import Group
from dump_activations.pipeline.interrupts import HeldInterrupts, ignored_interrupts
from dump_activations.pipeline.loop import Loop
from dump_activations.pipeline.plan import Plan, make_plan, warn_of_large_tensors
from dump_activations.pipeline.preview import Preview
from dump_activations.pipeline.provenance import fingerprint, metadata
from dump_activations.pipeline.shortage import batch_shortage_named
from dump_activations.pipeline.summary import Summary
from dump_activations.pipeline.tickets import cut_tickets
from dump_activations.pipeline.transfer import HOST_SLOTS
from dump_activations.place import Place
from dump_activations.progress import Phase, begin, counted, shown_progress
from dump_activations.storage.writing.batch_file import BatchFile
from dump_activations.storage.writing.joined_file import JoinedFile
from dump_activations.storage.writing.outlook import outlook
from dump_activations.storage.writing.output_file import OutputFile
from dump_activations.storage.writing.partial import tidy
from dump_activations.storage.writing.room import check_room, free_space
from dump_activations.storage.writing.targets import check_output, partial_path
from dump_activations.storage.writing.work import Existing, Work, find_existing
from dump_activations.storage.writing.writers import WriterPool

# What the first process tells the others: the size of a file that is complete already, or 0; the
# token of the one that is made; that it is complete.
_SIZE, _TOKEN, _COMMITTED = "size", "token", "committed"


def preview(init: Init, dataset: Dataset, path: Path, options: DumpOptions) -> Preview:
    """Check what `dump` checks before its first forward pass, and say what it would write.

    Raises:
        DumpActivationsError: what `dump` would raise.
    """
    if options.write:
        check_output(path, [STORAGE_DTYPES[options.dtype].name])
    plan = make_plan(init, dataset, options)
    if not options.write:
        return Preview.of(plan)
    previewed = Preview.of(plan, path, free_space(path))
    check_output(path, [STORAGE_DTYPES[options.dtype].name], inputs=plan.input_files)
    check_room(path, previewed.nbytes)
    work = _work(plan, path, options)
    for text in outlook(work, resume=options.resume, overwrite=options.overwrite):
        note(text)
    return previewed


def dump_to_file(init: Init, dataset: Dataset, path: Path, options: DumpOptions) -> Summary:
    """Write a run to a file, or run it without one; each process of a group does its share."""
    started = time.perf_counter()
    with (
        shown_progress() if options.progress is True else nullcontext(),
        Group.join() as group,
        muted() if group.place.rank else nullcontext(),
        batch_shortage_named(options.batch_size),
        shared_cores(group.place),
    ):
        if options.write:
            check_output(path, [STORAGE_DTYPES[options.dtype].name])
        slots = HOST_SLOTS if options.write else 0
        plan = make_plan(init, dataset, options, host_slots=slots, place=group.place)
        with (
            plan,
            current(plan.device),
            HeldInterrupts(all_of_them=bool(group.others)) as interrupts,
        ):
            group.attend_to(interrupts.check)
            run = _Run(group, plan, path, options, started, interrupts)
            return run.write() if options.write else run.discard()


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


@dataclass(frozen=True)
class _Run:
    """A run and its file, as one process of the group does its share."""

    group: Group
    plan: Plan
    path: Path
    options: DumpOptions
    started: float
    interrupts: HeldInterrupts

    def write(self) -> Summary:
        """Run it, and write its file."""
        work = _work(self.plan, self.path, self.options)
        check_same_work(self.group, work.header.work)
        return self._join(work) if self.group.place.rank else self._lead(work)

    def discard(self) -> Summary:
        """Run it, and keep nothing."""
        check_same_work(self.group, {**metadata(self.plan), **fingerprint(self.plan)})
        rows, size = len(self.plan.indices), self.options.batch_size

        def stretches() -> Iterator[range]:
            for ticket in self._tickets([range(-(-rows // size))]):
                yield range(ticket.start * size, min(ticket.stop * size, rows))

        progress = self._progress_from(0, 0)
        with Forward(self.plan) as forward:
            with Loop(self.plan, forward) as loop:
                for batch in loop.batches(progress, stretches=stretches()):
                    batch.release()
                    self.interrupts.check()
            loop.tell(self.group)
            self.group.leave()
            self._wait_for_others(loop, progress)
        return loop.summary(self.group, self.started)

    def _lead(self, work: Work) -> Summary:
        """Make the file, do a share of its batches, and complete it when all are done."""
        group, plan, path, options = self.group, self.plan, self.path, self.options
        existing = find_existing(work.target)
        if (options.resume or group.restarted) and existing and existing.is_of(work):
            tidy(work.target)
            note(f"{path} is complete already: there is nothing to do")
            if (partial := partial_path(work.target)).exists():
                note(f"{partial} is beside it, and stays: an unfinished dump of other work")
            group.say(_SIZE, existing.size)
            return nothing_done(group, plan, path, existing, self.started)
        group.say(_SIZE, 0)
        warn_of_large_tensors(work.specs)
        previewed = Preview.of(plan, path, free_space(path))
        begin("preparing the file")
        with Forward(plan) as forward:
            file = OutputFile.open(
                work,
                inputs=plan.input_files,
                overwrite=options.overwrite and not group.restarted,
                check=self._check,
                shared=bool(group.others),
            )
            with file:
                note(previewed.text)
                check_resumed_boards(file, plan)
                for text in beginning(file, existing, len(plan.indices)):
                    note(text)
                if file.token is not None:
                    group.say(_TOKEN, file.token)
                with self._kept_or_discarded(file):
                    for name, tensor in plan.whole_tensors().items():
                        file.write(name, bytes_of(tensor))
                    progress = self._progress_from(file.resumed_rows, file.size)
                    loop = self._fill(file, forward, progress)
                    self._wait_for_others(loop, progress)
                    begin("completing the file")
                    digests = file.commit()
                    group.say(_COMMITTED, 1)
                    self.interrupts.check()
        return loop.summary(
            group,
            self.started,
            output=path,
            resumed_boards=file.resumed_rows,
            bytes_written=file.size,
            nonfinite=nonfinite(digests),
        )

    def _join(self, work: Work) -> Summary:
        """Do a share of the batches of the file that the first process makes."""
        group = self.group
        if size := group.hear(_SIZE, 0):
            return nothing_done(group, self.plan, self.path, Existing(size), self.started)
        with Forward(self.plan) as forward:
            token = group.hear(_TOKEN, 0)
            with JoinedFile.join(work, rank=group.place.rank, token=token) as file:
                with self._kept_or_discarded(file):
                    progress = self._progress_from(file.resumed_rows, file.size)
                    loop = self._fill(file, forward, progress)
                    file.leave()
                group.leave()
                group.hear(_COMMITTED, 0)
        return loop.summary(
            group,
            self.started,
            output=self.path,
            resumed_boards=file.resumed_rows,
            bytes_written=file.size,
        )

    def _fill(self, file: BatchFile, forward: Forward, progress: Callable[[int], None]) -> Loop:
        """Do this process's share of the batches that a file lacks."""

        def stretches() -> Iterator[range]:
            for ticket in self._tickets(file.missing):
                file.begin_ticket(ticket)
                yield file.rows_of(ticket)

        if file.resumed_rows:
            progress(0)
        with (
            Loop(self.plan, forward) as loop,
            WriterPool(file, threads=writer_threads(self.group.place)) as writers,
            closing(loop.batches(progress, stretches=stretches())) as batches,
        ):
            for batch in batches:
                tensors = {**batch.boards.tensors, **batch.tensors}
                writers.submit(
                    batch.boards.first_row,
                    {name: bytes_of(tensor) for name, tensor in tensors.items()},
                    chunks=batch.chunks,
                    done=batch.release,
                )
                self.interrupts.check()
        loop.tell(self.group, writers.busy_seconds)
        return loop

    def _tickets(self, missing: Sequence[range]) -> Iterator[range]:
        """Take batches of those that are missing, as this process comes to need them."""
        processes = self.group.place.size
        if processes > 1:
            largest_nbytes = self.plan.largest_row_nbytes * self.options.batch_size
            missing = list(cut_tickets(missing, processes=processes, largest_nbytes=largest_nbytes))
        return self.group.take(missing)

    def _progress_from(self, resumed_rows: int, nbytes: int) -> Callable[[int], None]:
        """Go on to the boards; returns what is called with those that this process has done."""
        n, progress = len(self.plan.indices), self.options.progress
        phase = Phase("", "boards", start=resumed_rows, of=n, nbytes=nbytes)
        count = counted(phase, also=progress if callable(progress) else None)
        return lambda boards: count(resumed_rows + self.group.advance(boards), n)

    def _check(self) -> None:
        """Let the run be interrupted, and the others know that it goes on."""
        self.interrupts.check()
        self.group.advance()

    def _wait_for_others(self, loop: Loop, progress: Callable[[int], None]) -> None:
        """Wait until the others have done their shares, which belongs to the loop."""
        if self.group.others:
            self.group.wait_until_left()
            self.group.report()
            progress(0)
            loop.ended = time.perf_counter()

    @contextmanager
    def _kept_or_discarded(self, file: BatchFile) -> Iterator[None]:
        """Leave a state to resume where the run could be finished later, and nothing where not."""
        try:
            yield
        except BaseException as error:
            self.group.fail(for_good=isinstance(error, VocabularyError))
            if file.is_committed:
                error.add_note(f"{file.target} is complete")
                raise
            with ignored_interrupts():
                kept = self._leave(file)
            if kept:
                again = f"without {option('overwrite')}" if self.options.overwrite else "again"
                error.add_note(
                    Note(
                        f"{kept:,} of {len(self.plan.indices):,} boards are kept in "
                        f"{file.partial}; the same call {again} does the rest"
                    )
                )
            raise

    def _leave(self, file: BatchFile) -> int:
        """Leave the file as a failed run does; return the boards that are kept in it."""
        group = self.group
        if not group.place.rank:
            group.give_time_to_leave()
        kept = 0
        if group.failed_for_good:
            file.discard()
        else:
            kept = file.suspend()
        with suppress(GroupError):
            group.leave()
        return kept


def writer_threads(place: Place) -> int:
    """Return enough for some to wait for the disk while others take checksums."""
    return min(8, max(2, place.cores // 2))
