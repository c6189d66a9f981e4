"""An error in any stage of a run is the caller's, at once, and nothing of the run stays behind."""

import errno
import faulthandler
import gc
import mmap
import os
import signal
import threading
import time
import warnings
import weakref
from functools import partial
from pathlib import Path

import pytest

from dump_activations import StepsDataset, _rust, demo, dump, load_encoder, stream
from dump_activations.errors import OutputError

N, BATCH = 1000, 10
OPTIONS = {"outputs": ["layer_outputs", "pooled"], "n_samples": N, "batch_size": BATCH}
cpu_dump = partial(dump, device="cpu", allow_cpu=True, **OPTIONS)
cpu_stream = partial(stream, device="cpu", allow_cpu=True, **OPTIONS)


class StageError(Exception):
    """Raised by a stage of a run."""


@pytest.fixture(autouse=True)
def watchdog():
    """End a test that hangs, with the place of every thread."""
    faulthandler.dump_traceback_later(60, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def demo_model():
    return load_encoder(demo.CHECKPOINT)


@pytest.fixture
def model(demo_model):
    yield demo_model
    assert not demo_model._forward_hooks
    assert not any(module._forward_hooks for module in demo_model.modules())


@pytest.fixture
def buffers(monkeypatch):
    """Return weak references to all memory that runs have captured activations in."""
    known = []
    allocate = mmap.mmap

    def remember(*arguments, **options):
        pages = allocate(*arguments, **options)
        known.append(weakref.ref(pages))
        return pages

    monkeypatch.setattr(mmap, "mmap", remember)
    return known


def count():
    gc.collect()
    threads = sorted(thread.name for thread in threading.enumerate())
    tasks, descriptors = (len(list(Path(f"/proc/self/{of}").iterdir())) for of in ("task", "fd"))
    return threads, tasks, descriptors


def settled_count():
    """Count once the kernel, too, is done with the threads that have been joined."""
    before, now = None, count()
    while now != before:
        time.sleep(0.1)
        before, now = now, count()
    return now


@pytest.fixture
def nothing_stays(buffers, model):
    """Check that a test leaves no thread, no open file and no buffer."""
    cpu_dump(model, demo.DATASET, write=False)  # torch starts its own threads once
    assert buffers
    assert not any(reference() is not None for reference in buffers)
    before = settled_count()
    yield
    assert settled_count() == before
    assert not any(reference() is not None for reference in buffers)


@pytest.fixture
def broken_model(model):
    """Return the model, with a block that raises in the seventh batch."""
    calls = []

    def fail(*_):
        calls.append(1)
        # A batch goes through the model in as many pieces as there are cores.
        if len(calls) > 60:
            raise StageError("in the forward")

    handle = model.blocks[1].register_forward_hook(fail)
    yield model
    handle.remove()


USES = {
    "dump": lambda model, path: cpu_dump(model, demo.DATASET, path),
    "no-write": lambda model, _: cpu_dump(model, demo.DATASET, write=False),
    "stream": lambda model, _: list(cpu_stream(model, demo.DATASET)),
}


@pytest.mark.parametrize("use", USES)
def test_forward(use, nothing_stays, broken_model, tmp_path):
    with pytest.raises(StageError, match="in the forward"):
        USES[use](broken_model, tmp_path / "a.pt")


def fail_after(calls, function, error):
    """Return `function` as it is for some calls, then raising `error` for ever."""
    made = []

    def fail(*arguments, **options):
        made.append(1)
        if len(made) > calls:
            raise error
        return function(*arguments, **options)

    return fail


def is_raised(error, run):
    """Check that it is this error that surfaces, or the package's own because of it."""
    with pytest.raises((type(error), OutputError)) as caught:
        run()
    assert error in {caught.value, caught.value.__cause__}
    message = str(caught.value)
    error.__traceback__ = error.__context__ = None  # which hold the run's buffers
    return message


@pytest.mark.parametrize("use", USES)
def test_reader(use, nothing_stays, model, monkeypatch, tmp_path):
    error = StageError("in the reader")
    read = fail_after(2, StepsDataset.read_boards, error)
    monkeypatch.setattr(StepsDataset, "read_boards", read)
    is_raised(error, lambda: USES[use](model, tmp_path / "a.pt"))


@pytest.fixture(params=[".safetensors", ".npz"])
def target(request, tmp_path):
    return tmp_path / f"a{request.param}"


@pytest.mark.usefixtures("nothing_stays")
@pytest.mark.parametrize(
    ("number", "calls"), [*((errno.EIO, calls) for calls in (0, 1, 50, 300)), (None, 50)]
)
def test_writer(number, calls, target, model, monkeypatch):
    error = OSError(number, os.strerror(number)) if number else StageError("in a writer")
    monkeypatch.setattr(_rust, "write_span", fail_after(calls, _rust.write_span, error))
    message = is_raised(error, lambda: cpu_dump(model, demo.DATASET, target))
    if number:
        assert f"cannot write {target}.partial: Input/output error" in message


def test_flush(target, nothing_stays, model, monkeypatch):
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    monkeypatch.setattr(os, "fdatasync", fail_after(0, os.fdatasync, error))
    message = is_raised(error, lambda: cpu_dump(model, demo.DATASET, target))
    assert "Input/output error" in message
    assert not target.exists()


@pytest.mark.parametrize("write", [True, False])
@pytest.mark.parametrize("kind", [StageError, KeyboardInterrupt, SystemExit])
def test_progress(kind, write, nothing_stays, model, tmp_path):
    error = kind("in progress")

    def progress(done, _total):
        if done > N // 2:
            raise error

    target = tmp_path / "a.pt"
    is_raised(error, lambda: cpu_dump(model, demo.DATASET, target, write=write, progress=progress))


def test_a_warning_that_is_an_error(nothing_stays, model, tmp_path):
    """The file is there already when its values are found not to be finite."""
    weight = model.final_ln.weight.data
    before = weight.clone()
    weight.fill_(float("inf"))
    try:
        with warnings.catch_warnings(action="error"), pytest.raises(UserWarning, match="pooled"):
            cpu_dump(model, demo.DATASET, tmp_path / "a.pt")
    finally:
        weight.copy_(before)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_a_consumer_that_raises(nothing_stays, model):
    def consume():
        for batch in cpu_stream(model, demo.DATASET):
            if batch.first_row > N // 2:
                raise StageError("in the consumer")

    with pytest.raises(StageError, match="in the consumer"):
        consume()


@pytest.mark.parametrize("batches", [0, 1, 2, N // BATCH])
def test_a_stream_closed_early(batches, nothing_stays, model):
    stream_of_batches = cpu_stream(model, demo.DATASET)
    for _ in range(batches):
        next(stream_of_batches)
    stream_of_batches.close()


def test_a_stream_forgotten(nothing_stays, model):
    next(iter(cpu_stream(model, demo.DATASET)))


@pytest.mark.parametrize("use", USES)
def test_interruption(use, nothing_stays, model, tmp_path):
    """Ctrl-C while a block computes ends the run after that batch."""
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 40:
            os.kill(os.getpid(), signal.SIGINT)

    handle = model.blocks[0].register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            USES[use](model, tmp_path / "a.pt")
    finally:
        handle.remove()
    assert len(calls) < 100
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
