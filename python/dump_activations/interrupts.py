"""Ctrl-C, SIGTERM and the end of the program: runs and their threads end in order."""

import atexit
import math
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Any, Self, TypeVar

T = TypeVar("T")
R = TypeVar("R")
K = TypeVar("K")
G = TypeVar("G", bound=Generator[Any, None, None])

UNREAD = -signal.SIGPIPE
"""Exit code of a process whose reader left."""

_PR_SET_PDEATHSIG = 1  # from Linux's prctl.h
_REPEATED_WITHIN = 1.0  # seconds
_BOTH = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handled_by(handler: Any, numbers: Iterable[int] = _BOTH) -> Iterator[None]:
    """Install a handler of some signals inside the context, if this is the main thread."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, handler) for number in (numbers if is_main else ())}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def ignored_interrupts() -> AbstractContextManager[None]:
    """Ignore SIGINT and SIGTERM inside the context, which leaves a state to resume.

    Only signals that have a handler in Python are ignored, and only in the main thread.
    """
    return handled_by(signal.SIG_IGN, _python_handlers())


def _python_handlers() -> dict[int, Any]:
    """Return the handlers of SIGINT and SIGTERM in Python, which run in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {number: signal.getsignal(number) for number in _BOTH}
    return {number: handler for number, handler in handlers.items() if callable(handler)}


class HeldInterrupts:
    """Holds back a SIGINT or SIGTERM inside the context; use in any thread.

    Python raises KeyboardInterrupt between any two steps of the main thread. In the bookkeeping of
    a queue, a condition or a future that leaves a lock taken, or a waiting thread never woken, and
    the run would hang. The signal goes to its own handler at the next `check`, or when the context
    is left without an error. A second one is not held back, unless it follows within a second:
    launchers pass on a signal that the terminal has sent already.

    Only signals that have a handler in Python are held.
    """

    def __init__(self) -> None:
        self._handlers: dict[int, Any] = {}
        self._held: int | None = None
        self._first_at = math.inf

    def __enter__(self) -> Self:
        self._handlers = _python_handlers()
        for number in self._handlers:
            signal.signal(number, self._hold)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if kind is None:
            self._pass_on()

    def check(self) -> None:
        """Pass on the signal that was held back, if any, here or in a context around this one.

        Raises:
            KeyboardInterrupt: the handlers of Python and of this package's commands raise it.
        """
        self._pass_on()
        for handler in self._handlers.values():
            if isinstance(outer := getattr(handler, "__self__", None), HeldInterrupts):
                outer.check()

    def _pass_on(self) -> None:
        number, self._held = self._held, None
        if number is not None:
            self._handlers[number](number, None)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        self._first_at = min(self._first_at, now)
        if now - self._first_at > _REPEATED_WITHIN:
            self._handlers[number](number, frame)
        elif now == self._first_at:
            self._held = number


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM inside `terminated_like_interrupted`."""


def terminated_like_interrupted() -> AbstractContextManager[None]:
    """End on SIGTERM as on Ctrl-C inside the context: in order, with finished work kept."""

    def interrupt(_signal: int, _frame: object) -> None:
        raise Terminated

    return handled_by(interrupt, [signal.SIGTERM])


def ignore_interrupts() -> None:
    """Ignore SIGINT and SIGTERM from now on: the process is ending anyway."""
    for number in _BOTH:
        signal.signal(number, signal.SIG_IGN)


def signal_of(interrupt: KeyboardInterrupt) -> int:
    """Return the number of the signal that raised an interruption."""
    return signal.SIGTERM if isinstance(interrupt, Terminated) else signal.SIGINT


def die_of(number: int) -> None:
    """End the process by a signal. Returns only where it is blocked."""
    with suppress(OSError):  # SIGKILL, of which one of several processes may have died.
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def terminate_with_parent(parent: int) -> None:
    """Have the kernel send this process SIGTERM when its parent ends, or has ended already."""
    import ctypes  # Only processes of a launcher need it, --help does not.

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        signal.raise_signal(signal.SIGTERM)


def in_parallel(
    work: Callable[[T], R],
    items: Iterable[T],
    threads: int,
    take: Callable[[T, R], None],
    *,
    cancel: Callable[[], object] = lambda: None,
) -> None:
    """Call `work(item)` on threads, and `take(item, result)` in this thread, in order.

    The first error of either, or an interruption, ends all: calls that have not begun are dropped,
    and `cancel` asks those under way to end.
    """
    from concurrent.futures import ThreadPoolExecutor  # --help does not need it.

    items = list(items)
    with HeldInterrupts() as interrupts, ThreadPoolExecutor(threads) as executor:
        try:
            for item, result in zip(items, executor.map(work, items), strict=True):
                take(item, result)
                interrupts.check()
        except BaseException:
            cancel()
            executor.shutdown(cancel_futures=True)
            raise


def sum_in_parallel(
    work: Callable[[K, int, int], R],
    lengths: Mapping[K, tuple[int, int]],
    threads: int,
    progress: Callable[[int, int], object] | None = None,
) -> dict[K, R]:
    """Call `work(name, start, stop)` on threads for each chunk, and add results of a name in order.

    `lengths` maps a name to its length and the length of a chunk. An empty one has no result.
    `progress` is called in this thread with the length done and in all, and may raise.
    """
    found: dict[K, Any] = {}
    chunks = [
        (name, start, min(start + size, length))
        for name, (length, size) in lengths.items()
        for start in range(0, length, size)
    ]
    done, in_all = 0, sum(length for length, _ in lengths.values())

    def take(chunk: tuple[K, int, int], result: R) -> None:
        nonlocal done
        name, start, stop = chunk
        found[name] = found[name] + result if name in found else result
        done += stop - start
        if progress is not None:
            progress(done, in_all)

    in_parallel(lambda chunk: work(*chunk), chunks, threads, take)
    return found


_LONGEST_EXIT = 1.0  # seconds
_loops: weakref.WeakSet[Generator[Any, None, None]] = weakref.WeakSet()


def closed_at_exit(loop: G) -> G:
    """Return a generator that is closed when the program ends, if something holds it until then.

    Python would close it while it takes modules apart, when no thread pool can be shut down.
    """
    _loops.add(loop)
    return loop


@atexit.register
def _close_loops() -> None:
    for loop in list(_loops):
        # A daemon thread may run it. Python would end that thread inside of a call, which aborts.
        ends = time.monotonic() + _LONGEST_EXIT
        while getattr(loop, "gi_running", False) and time.monotonic() < ends:
            time.sleep(0.001)
        with suppress(ValueError):  # The thread is still in it.
            loop.close()
