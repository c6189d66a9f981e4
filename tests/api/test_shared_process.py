"""A run shares its process: the model, the device, signals, memory and descriptors of a program."""

import errno
import gc
import os
import threading
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import pytest
import torch

from dump_activations import StepsDataset, _rust, demo, dump, load_encoder, stream
from dump_activations.errors import DatasetError, DeviceError, OutputError
from dump_activations.model import capture
from dump_activations.pipeline.run import Run
from dump_activations.progress import SharedStopwatch
from dump_activations.storage.writing import paths
from output_support import (
    open_file,
    open_output,
    small_dump,
    write_batches,
    write_dump,
    write_whole_tensors,
)
from reference.dumps import read_dump

CPU = {"device": "cpu", "allow_cpu": True}
OPTIONS = {"outputs": ["final_hidden", "head_logits"], "n_samples": 50, "batch_size": 8} | CPU


@pytest.fixture
def model():
    return load_encoder(demo.CHECKPOINT)


def joined(batches, key):
    return torch.cat([batch[key] for batch in batches])


@pytest.fixture
def expected(model):
    return joined(stream(model, demo.DATASET, **OPTIONS), "final_hidden")


def test_the_consumer_may_run_the_model(model, expected):
    batches = []
    for batch in stream(model, demo.DATASET, **OPTIONS):
        hidden, _ = model(batch.boards)
        assert torch.allclose(hidden, batch["final_hidden"], atol=1e-5)
        batches.append(batch)
    assert torch.equal(joined(batches, "final_hidden"), expected)


def test_two_streams_of_one_model_in_turns(model, expected):
    both = zip(*(stream(model, demo.DATASET, **OPTIONS) for _ in range(2)), strict=True)
    for batches in zip(*both, strict=True):
        assert torch.equal(joined(batches, "final_hidden"), expected)


def test_dumps_of_one_model_on_several_threads(model, expected, tmp_path):
    def run(name):
        dump(model, demo.DATASET, tmp_path / name, **OPTIONS)

    threads = [threading.Thread(target=run, args=(f"{i}.pt",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        assert torch.equal(read_dump(tmp_path / f"{i}.pt").tensors["final_hidden"], expected)


def test_more_compiled_variants_than_torch_keeps(model, monkeypatch):
    monkeypatch.setattr(capture.torch, "compile", partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=2):
        for rows in range(2, 6):
            options = OPTIONS | {"n_samples": rows, "batch_size": rows, "compile": True}
            assert len(joined(stream(model, demo.DATASET, **options), "final_hidden")) == rows


def test_a_streams_device_is_current_while_it_computes_and_closes_only(model, monkeypatch):
    inside, seen = [], []

    @contextmanager
    def current(_device):
        inside.append(1)
        yield
        inside.pop()

    close = Run.__exit__
    monkeypatch.setattr("dump_activations.api.stream.current", current)
    monkeypatch.setattr(
        Run, "__exit__", lambda *each: (seen.append(("close", *inside)), close(*each))[1]
    )
    model.blocks[0].register_forward_hook(lambda *_: seen.append(("forward", *inside)))
    batches = stream(model, demo.DATASET, **OPTIONS)
    for _ in range(2):
        next(batches)
        assert not inside
    batches.close()
    assert seen == [("forward", 1), ("forward", 1), ("close", 1)]


def short_of_memory(model, batches):
    passes = []

    def fail(*_):
        passes.append(1)
        if len(passes) > batches:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    return model.blocks[0].register_forward_hook(fail)


def failing(message, kind=RuntimeError):
    def fail(*_):
        raise kind(message)

    return fail


def uses(model, path):
    """Return each way to run the model."""
    return [
        lambda: dump(model, demo.DATASET, path, **OPTIONS),
        lambda: dump(model, demo.DATASET, write=False, **OPTIONS),
        lambda: list(stream(model, demo.DATASET, **OPTIONS)),
    ]


def state_of(model):
    return [
        [(module.training, len(module._forward_hooks)) for module in model.modules()],
        [(weight, weight.device, weight.requires_grad) for weight in model.parameters()],
    ]


def test_the_callers_model_is_as_it_was(model, tmp_path):
    model.train().requires_grad_()
    model.blocks[1].eval()
    hook = model.blocks[0].register_forward_hook(lambda *_: None)
    before = state_of(model)
    for run in uses(model, tmp_path / "a.pt"):
        run()
        assert state_of(model) == before
    batches = stream(model, demo.DATASET, **OPTIONS)
    next(batches)
    assert state_of(model) == before
    del batches
    assert state_of(model) == before
    hook.remove()
    model.blocks[0].register_forward_hook(failing("broken", ZeroDivisionError))
    for run in uses(model, tmp_path / "b.pt"):
        with pytest.raises(ZeroDivisionError):
            run()
        assert state_of(model) == before


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), "out of device memory at"),
        (RuntimeError("CUDA error: out of memory\nmore"), "out of device memory at"),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
            "out of device memory for the workspace of cuBLAS at",
        ),
        (
            RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
            "out of device memory for the workspace of cuDNN at",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 5 bytes"),
            "out of host memory at",
        ),
        (MemoryError("Unable to allocate 2 TiB"), r"out of host memory \(Unable .* TiB\) at"),
    ],
)
def test_what_a_batch_is_short_of(error, text, model, tmp_path):
    model.blocks[0].register_forward_hook(failing(str(error), type(error)))
    for run in uses(model, tmp_path / "a.pt"):
        with pytest.raises(DeviceError, match=f"^{text} batch_size=8; free some, or try .*=4$"):
            run()
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit(model, monkeypatch):
    short = failing("CUDA out of memory. Tried to allocate 2.00 GiB.", torch.OutOfMemoryError)
    monkeypatch.setattr("dump_activations.model.checkpoint.replicate", short)
    for run in uses(model, "a.pt"):
        with pytest.raises(DeviceError, match=r"^out of device memory: the model does not fit on"):
            run()


@pytest.mark.parametrize("nth", [0, 1])
def test_no_more_threads(model, tmp_path, monkeypatch, nth):
    """Whichever thread of a run cannot be started."""
    before = threading.active_count()
    start, left = threading.Thread.start, [nth]

    def refuse(self):
        left[0] -= 1
        if left[0] < 0:
            raise RuntimeError("can't start new thread")
        start(self)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    torch.set_num_threads(2)
    try:
        for run in uses(model, tmp_path / "a.pt"):
            left[0] = nth
            with pytest.raises(DeviceError, match=r"^no more threads can be started; .*ulimit -u"):
                run()
            assert threading.active_count() == before
    finally:
        torch.set_num_threads(1)
    assert list(tmp_path.iterdir()) == []


def live_tensors():
    return {id(each) for each in gc.get_objects() if issubclass(type(each), torch.Tensor)}


@pytest.mark.parametrize("cores", [1, 2])
def test_nothing_of_a_run_that_lacked_memory_is_alive(cores, model, tmp_path):
    """Where the error is caught, and without a look for cycles: there a caller tries again."""
    torch.set_num_threads(cores)
    gc.collect()
    gc.disable()
    try:
        for run in uses(model, tmp_path / "a.pt"):
            handle = short_of_memory(model, 3)
            before = live_tensors()
            try:
                run()
            except DeviceError:
                assert live_tensors() <= before
            else:
                raise AssertionError
            handle.remove()
    finally:
        gc.enable()
        torch.set_num_threads(1)


def test_too_little_memory_in_the_middle_names_the_boards_kept_and_the_way_out(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr("dump_activations.storage.writing.journal.SYNC_INTERVAL", 0)
    handle = short_of_memory(model, 4)
    target = tmp_path / "a.pt"
    with pytest.raises(DeviceError, match="try batch_size=4 and overwrite=True") as caught:
        dump(model, demo.DATASET, target, overwrite=True, **OPTIONS)
    assert any("the same call again does the rest" in note for note in caught.value.__notes__)
    handle.remove()
    dump(model, demo.DATASET, target, overwrite=True, **(OPTIONS | {"batch_size": 4}))


def test_a_write_under_way_keeps_its_descriptor(tmp_path, monkeypatch):
    """Given up in the middle of a write, a run's number goes to no other file before its end."""
    described = small_dump()
    begun, go_on = threading.Event(), threading.Event()
    write_span = _rust.write_span

    def slow(*arguments):
        begun.set()
        assert go_on.wait(30)
        return write_span(*arguments)

    file = open_file(tmp_path / "a.pt", described)
    monkeypatch.setattr(_rust, "write_span", slow)
    writer = threading.Thread(target=file.write, args=("indices", described.data["indices"]))
    writer.start()
    assert begun.wait(30)
    file.suspend()
    with ExitStack() as files:
        mine = [files.enter_context((tmp_path / f"mine-{i}").open("w+b")) for i in range(5)]
        go_on.set()
        writer.join()
        assert [os.fstat(other.fileno()).st_size for other in mine] == [0] * 5


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_flush_a_directory(number, tmp_path, monkeypatch):
    fsync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):  # noqa: PTH112
            fail_with(number)
        fsync(descriptor)

    monkeypatch.setattr(paths.os, "fsync", refuse)
    write_dump(tmp_path / "a.pt", small_dump())
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_directory_that_fails_to_be_flushed_after_the_rename(tmp_path, monkeypatch):
    described = small_dump()
    target = tmp_path / "a.pt"
    file = open_file(target, described)
    write_whole_tensors(file, described)
    write_batches(file, described, described.first_rows)
    monkeypatch.setattr(paths.Mount, "sync_directory", partial(fail_with, errno.EIO))
    with pytest.raises(OutputError, match=r"a\.pt is complete, but"):
        file.commit()
    assert file.suspend() == 0
    assert target.exists()
    monkeypatch.undo()
    assert open_output(target, described).next() is None
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def fail_with(number, *_):
    raise OSError(number, os.strerror(number))


def test_a_stream_left_early_cancels_the_read_ahead(model, monkeypatch):
    given = []
    read_boards = StepsDataset.read_boards

    def remember(self, indices, out=None, *, cancel=None):
        given.append(cancel)
        return read_boards(self, indices, out, cancel=cancel)

    monkeypatch.setattr(StepsDataset, "read_boards", remember)
    batches = stream(model, demo.DATASET, **OPTIONS)
    next(batches)
    batches.close()
    with pytest.raises(DatasetError, match="interrupted"):
        read_boards(StepsDataset(demo.DATASET), [0], cancel=given[0])


def test_indices_that_another_thread_changes_during_the_read():
    """Each board is one that its index had at some time, or the call is refused; no more."""
    dataset = StepsDataset(demo.DATASET)
    rows = len(dataset)
    known = {board.tobytes() for board in dataset.read_boards(np.arange(rows))}
    indices = np.arange(100_000) % rows
    done = threading.Event()

    def shuffle():
        generator = np.random.default_rng(0)
        while not done.is_set():
            indices[:] = generator.integers(0, rows, len(indices))
            indices[7] = -1

    other = threading.Thread(target=shuffle)
    other.start()
    outcomes = set()
    try:
        for _ in range(60):
            out = np.full((len(indices), 16), 255, np.uint8)
            try:
                dataset.read_boards(indices, out)
            except IndexError:
                outcomes.add("refused")
            else:
                outcomes.add("read")
                assert {board.tobytes() for board in out} <= known
    finally:
        done.set()
        other.join()
    assert outcomes


def test_threads_inside_at_once_are_counted_once(monkeypatch):
    now = iter([10.0, 13.0, 20.0, 21.0])
    monkeypatch.setattr("dump_activations.progress.time.perf_counter", lambda: next(now))
    watch = SharedStopwatch()
    with watch, watch:
        pass
    with watch:
        pass
    assert watch.seconds == 4.0
