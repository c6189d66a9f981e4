"""Streams as queues of work, events as places in them, and the device that runs them."""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_NOT_WHILE_RECORDING = "CUDA error: operation not permitted when stream is capturing\nMore"


def _nothing() -> None:
    pass


class Task:
    """Work in a stream's queue, which may begin once the task `after` is done.

    Work that does nothing is a mark: done when all that was queued before it is.
    """

    def __init__(
        self,
        stream: "Stream",
        run: Callable[[], object] = _nothing,
        *,
        name: str = "",
        after: "Task | None" = None,
    ) -> None:
        self.stream = stream
        self.run = run
        self.name = name
        self.after = after
        self.done = False


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, device: "Device", *_: object) -> None:
        self._device = device
        self.number = len(device.streams)
        self.queue: deque[Task] = deque()
        device.streams.append(self)

    def synchronize(self) -> None:
        self._device.finish(self._device.submit(Task(self)))

    def wait_event(self, event: "Event") -> None:
        if event.mark is not None:
            self._device.submit(Task(self, after=event.mark))

    def wait_stream(self, other: "Stream") -> None:
        mark = self._device.submit(Task(other))
        self._device.submit(Task(self, after=mark))


class Event:
    """Stands in for `torch.cuda.Event`."""

    def __init__(
        self, device: "Device", *, enable_timing: bool = False, blocking: bool = False
    ) -> None:
        del blocking
        self._device = device
        self._timed = enable_timing
        self.mark: Task | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.mark = self._device.submit(Task(stream or self._device.current_stream()))

    def query(self) -> bool:
        self._device.proceed()
        return self.mark is None or self.mark.done

    def synchronize(self) -> None:
        if self.mark is not None:
            self._device.finish(self.mark)

    def elapsed_time(self, stop: "Event") -> float:
        for event in (self, stop):
            assert event._timed
            assert event.mark is not None
            assert event.mark.done
        return 1.0


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`: tasks that are queued again at each replay."""

    def __init__(self, device: "Device") -> None:
        self._device = device
        self.queue: deque[Task] = deque()

    def pool(self) -> object:
        return self

    def replay(self) -> None:
        for task in list(self.queue):
            self._device.submit(Task(self._device.current_stream(), task.run, name=task.name))


class Device:
    """Runs what its streams are given, in the threads that call it.

    Args:
        policy: runs as much of the queues as it likes; called whenever the program calls.

    Attributes:
        streams: the default one, then the others in the order in which they were created.
        log: the names of what was run, in order.
        threads: those that have named the device.
        allocations: tensors on the device that were allocated, but for those in graphs.
    """

    def __init__(self, policy: Callable[["Device"], None]) -> None:
        self._policy = policy
        self._lock = threading.RLock()
        self._here = threading.local()
        self.streams: list[Stream] = []
        self.log: list[str] = []
        self.threads: set[int] = set()
        self.allocations = 0
        self._recordings = 0
        Stream(self)

    def submit(self, task: Task) -> Task:
        """Queue a task in its stream."""
        with self._lock:
            if self.recording:
                assert task.name, "only work of kernels and queued copies is simulated in a graph"
                self.recording.queue.append(task)
            else:
                task.stream.queue.append(task)
                self.proceed()
        return task

    def proceed(self) -> None:
        """Let the policy run what it likes."""
        assert threading.get_ident() in self.threads, "this thread has not named the device"
        with self._lock:
            self._policy(self)

    def finish(self, task: Task) -> None:
        """Run what has to be done for the task to be done, and what the policy likes."""
        if self.recording:
            raise RuntimeError(_NOT_WHILE_RECORDING)
        with self._lock:
            self.proceed()
            while not task.done:
                self.step(task.stream)

    def step(self, stream: Stream) -> None:
        """Run a stream's next task, and first what that waits for."""
        task = stream.queue[0]
        while task.after is not None and not task.after.done:
            self.step(task.after.stream)
        stream.queue.popleft()
        with torch.inference_mode():
            task.run()
        if task.name:
            self.log.append(task.name)
        task.done = True
        task.run, task.after = _nothing, None  # and lets go of the memory it used

    def drain(self, stream: Stream) -> None:
        """Run all that a stream has been given."""
        while stream.queue:
            self.step(stream)

    def synchronize(self, _device: object = None) -> None:
        """Stands in for `torch.cuda.synchronize`."""
        if self._recordings:
            raise RuntimeError(_NOT_WHILE_RECORDING)
        with self._lock:
            for stream in self.streams:
                self.drain(stream)

    @property
    def recording(self) -> Graph | None:
        """The graph that this thread records."""
        return getattr(self._here, "graph", None)

    @contextmanager
    def record(self, graph: Graph, _pool: object, _stream: Stream, **_: object) -> Iterator[None]:
        """Stands in for `torch.cuda.graph`."""
        self.synchronize()
        self._here.graph = graph
        self._recordings += 1
        try:
            yield
        finally:
            self._recordings -= 1
            self._here.graph = None

    def current_stream(self, _device: object = None) -> Stream:
        """Stands in for `torch.cuda.current_stream`."""
        return getattr(self._here, "stream", self.streams[0])

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Stands in for `torch.cuda.stream`."""
        before = self.current_stream()
        self._here.stream = stream
        try:
            yield
        finally:
            self._here.stream = before
