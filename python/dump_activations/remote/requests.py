"""Makes requests in threads, so that Ctrl-C ends the wait, and shortens errors to one line."""

import atexit
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from threading import Event, Thread
from threading import enumerate as enumerate_threads
from typing import TYPE_CHECKING, TypeVar
from urllib.error import HTTPError

from dump_activations.errors import InvalidArgumentError, RemoteError
from dump_activations.interrupts import HeldInterrupts

if TYPE_CHECKING:
    from obstore.store import RetryConfig

_T = TypeVar("_T")

RETRIES: "RetryConfig" = {"max_retries": 10, "retry_timeout": timedelta(seconds=30)}
# Requests at once: 4,096 rows then take 3.2 s over a link of 100 MB/s and 20 ms.
_REQUESTS = 32
_POLL_SECONDS = 0.2
_FIRST_PROCESS = os.getpid()
_OVERLOADED = (429, 500, 502, 503, 504)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0  # seconds before a request is repeated
_LONGEST_EXIT = 1.0  # seconds
_THREAD = "requests"
# The hub's client logs each repetition with the URL, which may be signed.
logging.getLogger("huggingface_hub.utils._http").addFilter(
    lambda record: record.threadName != _THREAD
)
# Signed URLs carry their secret in the query, and clients quote the URL in errors.
_QUERY = re.compile(r"\?\S*")
_CODE = re.compile(r"<Code>(\w+)</Code>")
_ANSWERS = {
    "401": "log in, or check the credentials",
    "403": "check that the credentials allow it",
    "429": "the server asks for a pause: try again later",
    "500": "try again later",
    "503": "the server is overloaded: try again later",
}


class RemoteNotFoundError(RemoteError):
    """A file or directory behind a URL that does not exist."""


def run_all(
    works: Sequence[Callable[[], _T]],
    at_once: int = _REQUESTS,
    is_cancelled: Callable[[], bool] | None = None,
) -> list[_T]:
    """Make requests, some of them at once, and return their results in order.

    Raises the error of the first that fails, or what interrupts the wait: Ctrl-C, or another thread
    by `is_cancelled`. Requests under way are then left alone.
    """
    if os.getpid() != _FIRST_PROCESS:
        raise RemoteError(
            "connections do not survive a fork; start processes with spawn (a DataLoader's by "
            "multiprocessing_context='spawn')"
        )
    results: dict[int, _T] = {}
    # The threads share this iterator: the interpreter's lock makes each of its steps atomic.
    left, ended = enumerate(works), Event()

    def serve() -> None:
        for number, work in left:
            if ended.is_set():
                return
            results[number] = work()

    with HeldInterrupts() as interrupts:
        try:
            threads = {in_background(serve) for _ in works[: min(at_once, _REQUESTS)]}
            while threads:
                done, threads = wait(threads, _POLL_SECONDS, FIRST_EXCEPTION)
                for each in done:
                    each.result()
                interrupts.check()
                if is_cancelled is not None and is_cancelled():
                    raise KeyboardInterrupt
        finally:
            ended.set()
    return [results[number] for number in range(len(works))]


def ask(work: Callable[[], _T]) -> _T:
    """Make one request, and repeat it while the server is overloaded.

    obstore repeats its own requests, but Ctrl-C does not end its wait for them.
    """
    return run_all([partial(_repeated, work)])[0]


def _repeated(work: Callable[[], _T]) -> _T:
    """Repeat a request of the hub's client or of urllib while the server is overloaded."""
    ends = time.monotonic() + RETRIES["retry_timeout"].total_seconds()
    pause = _FIRST_PAUSE
    while True:
        try:
            return work()
        except Exception as error:
            answer = getattr(error, "response", None)
            status = getattr(error, "code", None) or getattr(answer, "status_code", None)
            if status not in _OVERLOADED or time.monotonic() + pause > ends:
                raise
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)


def in_background(work: Callable[[], _T]) -> Future[_T]:
    """Start a thread. An interruption does not wait for it, the end of the program for a second.

    The client would wake a loop of asyncio from threads of its own, and such a thread aborts a
    program that ends at the same moment.
    """
    done: Future[_T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    Thread(target=run, name=_THREAD, daemon=True).start()
    return done


@atexit.register
def _end() -> None:
    """Wait a little for requests under way: an answer that comes while Python ends aborts it."""
    ends = time.monotonic() + _LONGEST_EXIT
    for thread in enumerate_threads():
        if thread.name == _THREAD:
            thread.join(max(0, ends - time.monotonic()))


@contextmanager
def client_errors(what: str) -> Iterator[None]:
    """Turn what the clients raise into one line that names the file and what to do."""
    try:
        yield
    except (RemoteError, InvalidArgumentError):
        raise
    except FileNotFoundError as error:
        code = _CODE.search(str(error))
        place = code[1] if code else "no such file or directory"
        raise RemoteNotFoundError(f"{what}: {place}; check the address") from error
    except Exception as error:  # The clients raise errors of many libraries.
        is_missing = "NotFound" in type(error).__name__
        if is_missing or (isinstance(error, HTTPError) and error.code == 404):
            raise RemoteNotFoundError(
                f"{what}: no such repository, revision or file; check the name, or log in"
            ) from error
        raise RemoteError(f"{what}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Shorten the report of a client to its reason, and add what to do."""
    if type(error) is RuntimeError and error.__cause__:  # The hub's client hides an upload's.
        return _reason(error.__cause__)
    text = str(getattr(error, "server_message", None) or error).strip()
    if "Range request not supported" in text:
        return "the server has no ranges; download it whole, and give its path"
    if answer := re.search(
        r"(?:status code|HTTP Error|Client error|Server error):? '?([0-9]{3})[: ]*([\w ]*)", text
    ):
        code = _CODE.search(text)
        reason = code[1] if code else answer[2].strip()
        advice = _ANSWERS.get("401" if "Expired" in reason else answer[1], "check the address")
        return f"{answer[1]} {reason}; {advice}"
    if "error sending request" in text or "urlopen error" in text:
        causes = re.findall(r'message: "([^"]+)"|\[Errno -?[0-9]+\] ([^>]+)', text)
        return f"no answer ({''.join(causes[-1]) if causes else 'timed out'}); try again later"
    if "body error" in text:
        return "the server's answer was cut short; try again"
    return _QUERY.sub("", text.partition("\n")[0])[:300] or type(error).__name__
