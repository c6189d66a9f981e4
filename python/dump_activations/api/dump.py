"""`dump`: run boards through a model and write the asked-for activations to disk."""

import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from dump_activations.api.step_indices import indices_files, with_step_indices
from dump_activations.dataset.dataset import StepsDataset
from dump_activations.dataset.expressions import Expression
from dump_activations.dtypes import LABEL_PREFIX, STORAGE_DTYPES
from dump_activations.errors import (
    InvalidArgumentError,
    Note,
    OutputError,
    VocabularyError,
    note,
    option,
    size_text,
    warn,
)
from dump_activations.interrupts import HeldInterrupts, ignored_interrupts
from dump_activations.model.activations import Layers
from dump_activations.model.encoder import Encoder
from dump_activations.pipeline.device import DeviceAdvice, cores_of, current
from dump_activations.pipeline.feed import read_batch
from dump_activations.pipeline.options import DumpOptions
from dump_activations.pipeline.plan import (
    Plan,
    Preview,
    computed_by,
    fingerprint,
    make_plan,
    metadata,
)
from dump_activations.pipeline.run import Run, Summary
from dump_activations.pipeline.transfer import HOST_SLOTS, ActivationBatch
from dump_activations.progress import Count, Phase, begin, counted, shown_progress
from dump_activations.remote.upload import output_path, uploads_of
from dump_activations.storage.statistics import statistics_specs
from dump_activations.storage.writing.existing import choose_shards
from dump_activations.storage.writing.output import OutputFile
from dump_activations.storage.writing.paths import check_output, free_space
from dump_activations.storage.writing.shards import Output, Place
from dump_activations.storage.writing.work import DEFAULT_SHARD_NBYTES, Work
from dump_activations.storage.writing.writers import Writers

_ALONE = Place()
_LARGE_TENSOR = 8 << 30


def dump(
    init: str | os.PathLike[str] | Encoder,
    dataset: str | os.PathLike[str] | StepsDataset,
    output: str | os.PathLike[str] = "activations.safetensors",
    *,
    outputs: str | Sequence[str] = ("final_hidden",),
    layers: Layers | None = None,
    split_layers: bool = False,
    n_samples: int = 1024,
    indices: ArrayLike | os.PathLike[str] | None = None,
    steps: slice | str | None = None,
    where: str | Expression | None = None,
    labels: str | Sequence[str] = (),
    scan_progress: Count | None = None,
    seed: int = 0,
    batch_size: int = 1024,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    device: str | torch.device = "cuda",
    allow_cpu: bool = False,
    random_init: bool = False,
    precision: Literal["fp32", "tf32", "bf16", "bf16-true"] = "fp32",
    compile: bool = False,  # noqa: A002 -- the command's flag
    cuda_graph: bool = True,
    write: bool = True,
    stats: bool = False,
    shard_size: int | str | None = None,
    shards: int | str | range | None = None,
    overwrite: bool = False,
    progress: Count | bool | None = None,
) -> Summary:
    """Run boards through a model and write the asked-for activations to one file, or to shards.

    The output appears under its name when it is whole. After an interruption the same call resumes,
    and on a finished output it returns at once. Several processes that make the same call with
    `shard_size` share the work.

    Args:
        init: a checkpoint directory, `.pt` bundle or `hf://org/repo[/subdir][@revision]`; or a
            loaded Encoder.
        dataset: a dataset of steps, or its directory.
        output: the output's path, or its URL in a bucket or on the hub; its suffix,
            `.safetensors`, `.pt` or `.npz`, selects the format.
        outputs: activation keys, globs of them ("attn_*") or names of TransformerLens hooks.
        layers: layers to keep, as Python indexes them: -1, [0, 3] or "0,3,-1,4:8"; None keeps
            all.
        split_layers: write one tensor per layer, KEY.LAYER, in place of a stacked one.
        n_samples: steps to sample, unless `indices` or `steps` are given.
        indices: global step indices to use instead of a sample, whole numbers of any shape; or a
            file of them: a `.npy`, an `.npz` with `indices`, or an earlier dump.
        steps: steps to take in their order instead of a sample, START:STOP or START:STOP:STEP.
        where: take only steps that match this expression, such as "max_exponent >= 11".
        labels: labels to store with the boards, globs of them, or "all" for every field.
        scan_progress: called with the rows scanned and the rows in all while `where` is evaluated.
        seed: seed of the sample, of numpy.random.default_rng.
        batch_size: boards per forward pass.
        dtype: storage dtype of floating-point tensors.
        device: compute device: cuda, cuda:N, or cpu with `allow_cpu`.
        allow_cpu: run on the CPU where there is no GPU.
        random_init: give the checkpoint's architecture untrained weights, as a control.
        precision: arithmetic of the forward pass; tf32 on CUDA only.
        compile: run the model through torch.compile.
        cuda_graph: replay full batches as CUDA graphs, where a CUDA device and the model allow it.
        write: False runs the model and keeps nothing.
        stats: store statistics of each activation, stats/KEY/mean and others.
        shard_size: largest size of a shard, such as "4GB" or a number of bytes; None writes one
            file.
        shards: numbers of the shards to write, 3 or "1-20", counted from 1; None writes all.
        overwrite: replace output of other work. Output of the same work is never discarded.
        progress: True shows a bar. A function is called per batch with the boards done and the
            boards in all.

    Returns:
        The work that was done, and how long each stage was busy.

    Raises:
        DumpActivationsError: one line that names what is wrong and the way out. No file appears
            under the output's name then, and an existing one is left as it was.
    """
    options = DumpOptions.of(locals())
    return dump_to_file(init, dataset, output_path(output), options)


def preview(
    init: str | os.PathLike[str] | Encoder,
    dataset: str | os.PathLike[str] | StepsDataset,
    path: Path,
    options: DumpOptions,
    place: Place = _ALONE,
) -> Preview:
    """Check everything that `dump` checks before its first forward; describe its output."""
    plan = _make_plan(init, dataset, path, options)
    if not options.write:
        return Preview(plan, plan.tensor_specs())
    output = _look(plan, path, options, place)
    output.check_space()
    for text in (*output.notes(), *output.notes_on_partial_files()):
        note(text)
    return _preview(plan, path, output)


def dump_to_file(
    init: str | os.PathLike[str] | Encoder,
    dataset: str | os.PathLike[str] | StepsDataset,
    path: Path,
    options: DumpOptions,
    *,
    place: Place = _ALONE,
    local_processes: int = 1,
) -> Summary:
    """Run `dump`, as one of several processes where a launcher started them.

    `local_processes` on this machine share its cores and pinned memory.
    """
    started = time.perf_counter()
    with (
        shown_progress() if options.progress is True else nullcontext(),
        DeviceAdvice(batch_size=options.batch_size),
    ):
        plan = _make_plan(init, dataset, path, options)
        with current(plan.device), HeldInterrupts() as interrupts:
            call = _Call(plan, path, options, place, local_processes, started, interrupts)
            return call.write() if options.write else call.discard()


@dataclass(frozen=True)
class _Call:
    """One call of `dump` whose plan is made."""

    plan: Plan
    path: Path
    options: DumpOptions
    place: Place
    local_processes: int
    started: float
    interrupts: HeldInterrupts

    def write(self) -> Summary:
        """Run the boards of every file that is missing, and write it."""
        output = _look(self.plan, self.path, self.options, self.place, self.interrupts.check)
        shards, is_run = [each.shard for each in output.files if each.shard], bool(output.missing)
        if is_run:
            summary = self._run(output)
            _note_mixture(output)
        else:
            output.tidy()
            note(*output.notes())
            keys = tuple(each.key for each in self.plan.activations)
            summary = Summary(keys=keys, setup_seconds=time.perf_counter() - self.started)
        return replace(
            summary,
            output=output.url or self.path,
            resumed_boards=sum(file.rows for file in output.files) - summary.boards,
            bytes_written=sum(
                output.finished[file.target].size
                for file in output.files
                if file.target in output.finished
            ),
            nonfinite=_nonfinite(output, warn_of_them=is_run),
            shards_written=output.written if shards else 0,
            shards_found=len(shards) - output.written if shards else 0,
        )

    def _run(self, output: Output) -> Summary:
        """Write all files that are missing."""
        for spec in output.files[0].work.specs:
            if spec.nbytes >= _LARGE_TENSOR:
                warn(
                    f"{spec.name} will take {spec.nbytes / 2**30:.1f} GiB; fewer boards "
                    f"({option('n_samples')}) or {option('dtype', 'fp16')} or bf16 make it smaller"
                )
        run = Run(self.plan, host_slots=HOST_SLOTS, local_processes=self.local_processes)
        with output, run, self._kept_or_discarded(output):
            self._prepare(output)
            write_seconds = self._fill(run, output)
            self.interrupts.check()
        return run.summary(self.started, write_seconds=write_seconds)

    def discard(self) -> Summary:
        """Run this process's share of the batches, and keep nothing."""
        n, size = len(self.plan.indices), self.options.batch_size
        batches, (rank, world) = -(-n // size), (self.place.rank, self.place.size)
        start, stop = (batches * each // world * size for each in (rank, rank + 1))
        rows = range(start, min(stop, n))
        count, done = self._counter(0, len(rows), 0), 0
        with Run(self.plan) as run:
            for batch in run.batches([rows]):
                batch.release()
                done += len(batch.boards.indices)
                count(done, len(rows))
                self.interrupts.check()
        return run.summary(self.started)

    def _prepare(self, output: Output) -> None:
        """Make the output's directory, and describe the output in notes."""
        begin("preparing the output")
        output.check_space()
        directory = output.missing[0].target.parent
        if not directory.exists():
            with OutputError.when(f"cannot make {directory}"):
                directory.mkdir(parents=True, exist_ok=True)
            note(f"made the directory {directory}")
        note(_preview(self.plan, self.path, output).text)
        for text in output.notes():
            note(text)

    def _fill(self, run: Run, output: Output) -> float:
        """Write file after file until all are finished; return the seconds of busy writers."""
        resumed = done = 0
        write_seconds = 0.0
        n = sum(file.rows for file in output.files)

        def ranges(file: OutputFile | None) -> Iterator[range]:
            nonlocal resumed
            while file is not None:
                self._begin_file(file)
                resumed += file.resumed_rows
                yield from map(file.work.run_rows_of, file.missing)
                if not file.missing:
                    output.commit(file)
                # A remote output writes one file while the one before it is uploaded.
                file = output.take() if output.url is None else None

        def advance(boards: int) -> None:
            nonlocal done
            done += boards
            count(output.boards_of_others + resumed + done, n)

        while (first := output.next()) is not None:
            there = output.boards_of_others + resumed + done + first.resumed_rows
            nbytes = sum(each.tensor_nbytes for each in output.files)
            count = self._counter(there, n, nbytes)
            with (
                Writers(output.commit, threads=writer_threads(self.local_processes)) as writers,
                closing(run.batches(ranges(first), done=advance)) as batches,
            ):
                for batch in batches:
                    self._submit(writers, output, batch)
                    self.interrupts.check()
                begin("completing the output")
            write_seconds += writers.busy.seconds
        # Shards are committed while others are computed, a whole file after the last batch.
        if output.files[0].shard is None:
            run.commit_seconds = output.commit_seconds
        return write_seconds

    def _begin_file(self, file: OutputFile) -> None:
        """Write the tensors that do not come in batches, and say what is resumed."""
        path = file.partial
        if file.restarted_because:
            note(f"{path} is started over: {file.restarted_because}")
        if file.resumed_rows:
            note(f"resuming {path}, which has {file.resumed_rows:,} of {file.work.rows:,} boards")
            self._check_resumed_boards(file)
        for name, tensor in self.plan.weights.items():
            file.write(name, bytes_of(tensor.to(self.plan.storage_dtype)))

    def _check_resumed_boards(self, file: OutputFile) -> None:
        """Refuse to resume where the dataset's rows changed since the last batch was written."""
        if (last := file.last_resumed) is None:
            return
        batch, digests = last
        rows = file.work.run_rows_of(range(batch, batch + 1))
        boards = read_batch(self.plan, rows)
        if any(
            zlib.crc32(bytes_of(tensor).data) != digests[name].crc32
            for name, tensor in boards.tensors.items()
        ):
            raise OutputError(
                f"{file.partial} holds other boards than {self.plan.dataset.path} has now; restore "
                f"the dataset, or remove the file"
            )

    def _submit(self, writers: Writers, output: Output, batch: ActivationBatch) -> None:
        row = batch.boards.first_row
        file = next(each for each in output.open_files if row in each.work.run_rows)
        tensors = {**batch.boards.tensors, **batch.tensors}
        writers.submit(
            file,
            file.work.batch_at(row),
            {name: bytes_of(tensor) for name, tensor in tensors.items()},
            chunks=batch.chunks,
            done=batch.release,
        )

    def _counter(self, done: int, n: int, nbytes: int) -> Count:
        """Begin to count boards; return the function that takes boards done and boards in all."""
        progress = self.options.progress
        phase = Phase("", "boards", start=done, of=n, nbytes=nbytes)
        count = counted(phase, also=progress if callable(progress) else None)
        if done:
            count(done, n)
        return count

    @contextmanager
    def _kept_or_discarded(self, output: Output) -> Iterator[None]:
        """Keep what a later call can resume, and nothing of a run that can never finish."""
        try:
            yield
        except BaseException as error:
            with ignored_interrupts():
                kept = output.suspend(discard=isinstance(error, VocabularyError))
            if not output.missing and output.url is None:
                error.add_note(f"{output.files_are} complete")
            elif kept:
                n, where = sum(file.rows for file in output.files), output.url or self.path
                error.add_note(
                    Note(
                        f"{kept:,} of {n:,} boards of {where} are kept; the same call again does "
                        "the rest"
                    )
                )
            raise


def _make_plan(
    init: str | os.PathLike[str] | Encoder,
    dataset: str | os.PathLike[str] | StepsDataset,
    path: Path,
    options: DumpOptions,
) -> Plan:
    """Make the plan of a call, and refuse an output that would replace what the run reads."""
    dtypes = [STORAGE_DTYPES[options.dtype].name]
    if options.write:
        check_output(path, dtypes, inputs=indices_files(options))
    dataset, options = with_step_indices(dataset, options)
    plan = make_plan(init, dataset, options)
    if options.write:
        check_output(path, dtypes, inputs=plan.input_files)
    return plan


def _look(
    plan: Plan,
    path: Path,
    options: DumpOptions,
    place: Place,
    check: Callable[[], object] = lambda: None,
) -> Output:
    """Cut the output into files, and look at what is there in their places."""
    work = _work(plan, path, stats=options.stats)
    share = place.size > 1 or options.shards is not None
    assert not isinstance(options.shard_size, str)
    shards = choose_shards(work, options.shard_size, share=share)
    if shards is None and uploads_of(work.whole.parent) is not None:
        shards = work.count_shards(DEFAULT_SHARD_NBYTES)
    files = work.files(shards)
    largest_nbytes = max(files[0].tensor_nbytes, files[-1].tensor_nbytes)
    if options.shard_size is not None and largest_nbytes > options.shard_size:
        note(f"{option('shard_size')}: raised to one batch, {size_text(largest_nbytes)}")
    if isinstance(options.shards, range) and shards is not None:
        if options.shards.stop > len(files) + 1:
            raise InvalidArgumentError(
                f"{option('shards')}: must be between 1 and {len(files)}, the last shard; got "
                f"{options.shards.stop - 1}"
            )
        files = files[options.shards.start - 1 : options.shards.stop - 1]
    output = Output(files, place=place, overwrite=options.overwrite, check=check)
    for replaced in output.replaced if output.url is None else ():
        check_output(replaced, [STORAGE_DTYPES[options.dtype].name], inputs=plan.input_files)
    return output


def _work(plan: Plan, path: Path, *, stats: bool) -> Work:
    """Name everything that determines the output's bytes."""
    stacked = None if plan.options.split_layers else len(plan.layers)
    statistics = [
        spec
        for each in plan.board_tensors
        for spec in statistics_specs(
            each.name, layers=stacked if each.activation.per_layer else None, width=each.shape[-1]
        )
        if stats
    ]
    specs = [*plan.tensor_specs(), *statistics]
    separate = {*plan.weights, *(spec.name for spec in statistics)}
    return Work(
        whole=Path(os.path.realpath(path)),
        specs=specs,
        batched=[spec.name for spec in specs if spec.name not in separate],
        batch_rows=plan.options.batch_size,
        metadata={**metadata(plan), **({"stats": "true"} if stats else {})},
        computed_by=computed_by(plan),
        identity={**fingerprint(plan), "stats": str(stats).lower()},
    )


def _preview(plan: Plan, path: Path, output: Output) -> Preview:
    """Describe the files that a call may write, as one dump of their boards."""
    work, rows = output.files[0].work, sum(file.rows for file in output.files)
    specs = [
        replace(spec, shape=(rows, *spec.shape[1:])) if spec.name in work.batched else spec
        for spec in work.specs
    ]
    shards = {file.target: file.rows for file in output.files if file.shard is not None}
    free_nbytes = free_space([file.target for file in output.missing or output.files])
    return Preview(plan, specs, output.url or path, free_nbytes, shards)


def _note_mixture(output: Output) -> None:
    """Note where different devices or numbers of threads computed the output."""
    makers: set[str] = set()
    for text in {each.computed_by for each in output.finished.values()}:
        with suppress(ValueError, TypeError):  # A file may carry any text.
            makers.update(map(json.dumps, json.loads(text)))
    if len(makers) > 1:
        note(f"values agree to rounding only: they were computed by {', '.join(sorted(makers))}")


def _nonfinite(output: Output, *, warn_of_them: bool = False) -> dict[str, dict[str, int]]:
    """Count the values that are not finite in each tensor of all finished files that has any."""
    counts: dict[str, dict[str, int]] = {}
    for finished in output.finished.values():
        for name, digest in finished.digests.items():
            # Labels are as the dataset has them.
            if (digest.nan or digest.inf) and not name.startswith(LABEL_PREFIX):
                count = counts.setdefault(name, {"nan": 0, "inf": 0})
                count["nan"] += digest.nan
                count["inf"] += digest.inf
    for name, count in counts.items() if warn_of_them else ():
        warn(
            f"{name}: {count['nan']:,} NaN and {count['inf']:,} infinite values were stored; "
            f"infinite ones come from an overflow where {option('dtype')} is fp16"
        )
    return counts


def bytes_of(tensor: Tensor) -> NDArray[np.uint8]:
    """View a contiguous host tensor as its bytes, uint8 (nbytes,)."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def writer_threads(local_processes: int) -> int:
    """Return enough threads that some wait for the disk while others take checksums."""
    return min(8, max(2, cores_of(local_processes) // 2))
