"""The processes that share a run, and all that they tell one another.

torchrun starts them and brings the store. It has no authentication: whoever reaches its port can
read, write and delete every key. Hence its values are integers in their range, its keys carry a
nonce of the run, what it says of work done is a hint, and every wait has an end.
"""

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import Self

from torch._C._distributed_c10d import HashStore, Store
from torch.distributed.rendezvous import rendezvous

from dump_activations.errors import GroupError
from dump_activations.place import Place

BITS = 63
"""Of an integer in the store, which has no sign."""

# Seconds without any progress of the group after which a process no longer waits for another.
_PATIENCE = 1800.0

# Seconds between two looks at the store, and between two reports of progress.
_PAUSE = 0.01
_REPORT_INTERVAL = 0.5

# Seconds in which the others leave once one has failed.
_GRACE = 3.0

_STORE_TIMEOUT = timedelta(seconds=300)


def _nothing() -> None:
    pass


class Group:
    """The processes of one run, as one of them sees them; a context manager.

    All of them make the same calls of `dump` in the same order. Leaving the context with an error
    ends the others' work too.

    Attributes:
        place: this process's.
        restarted: whether the run was started again after a failure.
        failed_first: whether this process failed, and before any other.
    """

    def __init__(self, place: Place, store: Store) -> None:
        """Meet the others, who do the same.

        Args:
            place: this process's.
            store: that of all of them.

        Raises:
            GroupError: they do not come, or the store is lost.
        """
        self.place = place
        self.failed_first = False
        self._store = store
        self._prefix = "dump_activations/"
        self._alive = -1
        self._attend: Callable[[], object] = _nothing
        self._boards = self._unreported = 0
        self._report_at = 0.0
        self._has_failed = self._failed_for_good = False
        self.restarted = self._meet() > 0

    @classmethod
    def join(cls) -> Self:
        """Join the group that torchrun put this process in, or be one alone.

        Raises:
            GroupError: as above.
        """
        place = Place.of_process()
        if place is None:
            return cls(Place(), HashStore())
        with _named_store():
            store = _torchrun_store()
        group = cls(place, store)
        _joined.append(group)
        return group

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self.fail()
        elif self.place.rank:
            with suppress(GroupError):
                self.say(f"gone/{self.place.rank}", 1)
        else:
            self._give_time("gone")  # The store may be this process's.

    @property
    def others(self) -> range:
        """Ranks of all processes but the first."""
        return range(1, self.place.size)

    def say(self, what: str, value: int) -> None:
        """Tell all others a number, which stays."""
        assert 0 <= value < 1 << BITS, what
        with _named_store():
            self._store.set(self._prefix + what, str(value))

    def heard(self, what: str) -> int | None:
        """Return the number that was told; None if none was."""
        key = self._prefix + what
        with _named_store():
            if not self._store.check([key]):
                return None
            text = self._store.get(key)
        try:
            value = int(text)
        except ValueError:
            value = -1
        if not 0 <= value < 1 << BITS:
            raise GroupError(f"the store of the processes holds {text[:80]!r} as {what}")
        return value

    def attend_to(self, check: Callable[[], object]) -> None:
        """Have `check` called now and then while others are waited for; it may raise."""
        self._attend = check

    def hear(self, what: str, rank: int, *, meanwhile: Callable[[], object] = _nothing) -> int:
        """Wait until a process tells a number.

        Args:
            what: its name.
            rank: who tells it.
            meanwhile: called now and then.

        Raises:
            GroupError: a process failed, or none made progress for long.
        """
        self._alive, deadline = -1, 0.0
        while True:
            value = self.heard(what)
            if value is not None:
                return value
            self.check()
            self._attend()
            meanwhile()
            if self._has_advanced():
                deadline = time.monotonic() + _PATIENCE
            elif time.monotonic() > deadline:
                raise GroupError(f"waited {_PATIENCE:,.0f} seconds in vain for rank {rank}")
            time.sleep(_PAUSE)

    def count(self, what: str, amount: int = 1) -> int:
        """Add to a counter of all processes; return what it comes to."""
        with _named_store():
            total: int = self._store.add(self._prefix + what, amount)
        return total

    def take(self, tickets: Sequence[range]) -> Iterator[range]:
        """Take tickets that no other process takes, one by one, until none is left.

        Args:
            tickets: all of them, the same in every process.

        Raises:
            GroupError: another process failed.
        """
        while (number := self.count("ticket") - 1) < len(tickets):
            self.check()
            yield tickets[number]

    def advance(self, boards: int = 0) -> int:
        """Note progress, told to the others now and then; return the boards of all, about.

        Args:
            boards: how many more this process has done.
        """
        self._unreported += boards
        if time.monotonic() > self._report_at:
            self.report()
        return self._boards + self._unreported

    def report(self) -> int:
        """Tell the others all progress; return the boards of all."""
        self.count("alive")
        self._boards = self.count("boards", self._unreported)
        self._unreported, self._report_at = 0, time.monotonic() + _REPORT_INTERVAL
        return self._boards

    def check(self) -> None:
        """Raise where another process has failed.

        Raises:
            GroupError: names it.
        """
        rank = self.heard("failed")
        if rank is not None:
            raise GroupError(f"rank {rank} failed, and its own error says why")

    @property
    def failed_for_good(self) -> bool:
        """Whether a process has failed as it would always fail, as far as can be known."""
        with suppress(GroupError):
            return self._failed_for_good or self.heard("for good") is not None
        return False

    def fail(self, *, for_good: bool = False) -> bool:
        """Tell the others, once, that this process fails; return whether it was the first.

        Args:
            for_good: whether it always would.
        """
        if not self._has_failed:
            self._has_failed, self._failed_for_good = True, for_good
            try:
                if for_good:
                    self.say("for good", 1)
                self.failed_first = self.count("failures") == 1
                if self.failed_first:
                    self.say("failed", self.place.rank)
            except GroupError:  # One for each machine, where none can know of the others.
                self.failed_first = self.place.local_rank == 0
        return self.failed_first

    def leave(self) -> None:
        """Tell the first process that this one writes no more."""
        self.say(f"left/{self.place.rank}", 1)

    def wait_until_left(self) -> None:
        """Wait until all others have left in good order.

        Raises:
            GroupError: one of them failed, or makes no progress.
        """
        for rank in self.others:
            self.hear(f"left/{rank}", rank)
        self.check()

    def give_time_to_leave(self) -> None:
        """Wait a little until the others have left, once one of them has failed."""
        self._give_time("left")

    def _give_time(self, what: str) -> None:
        deadline = time.monotonic() + _GRACE
        with suppress(GroupError):
            for rank in self.others:
                while self.heard(f"{what}/{rank}") is None and time.monotonic() < deadline:
                    time.sleep(_PAUSE)

    def _has_advanced(self) -> bool:
        before, self._alive = self._alive, self.heard("alive") or 0
        return self._alive != before

    def _meet(self) -> int:
        """Agree on a nonce with the others; return the most restarts that one of them has seen.

        What an earlier run left in the store, or this one before it was restarted, answers nobody.
        """
        place = self.place
        mine = secrets.randbits(BITS)
        if place.rank:
            self.say(f"here/{place.rank}", mine)
            nonce = self.hear(f"nonce/{mine}", 0)
            self.say(f"{nonce}/restarts/{place.rank}", place.restarts)
            restarts = self.hear(f"{nonce}/restarts", 0)
        else:
            nonce, restarts = mine, place.restarts
            for rank in self.others:
                restarts = max(restarts, self._welcome(rank, nonce))
            self.say(f"{nonce}/restarts", restarts)
        self._prefix += f"{nonce}/"
        return restarts

    def _welcome(self, rank: int, nonce: int) -> int:
        """Give the nonce to whoever is, or was, that rank; return the restarts that it tells."""
        answered: set[int | None] = {None}

        def answer() -> None:
            asking = self.heard(f"here/{rank}")
            if asking not in answered:
                self.say(f"nonce/{asking}", nonce)
                answered.add(asking)

        return self.hear(f"{nonce}/restarts/{rank}", rank, meanwhile=answer)


# Those that this process has joined.
_joined: list[Group] = []


def fails_first(*, waits: bool) -> bool:
    """Whether this process, which fails, is to say why: the first in its group to fail.

    Args:
        waits: whether a process that has not met the others yet may wait for them.
    """
    place = Place.of_process()
    if place is None:
        return True
    try:
        if waits and not _joined:
            Group.join()
        if _joined:
            return _joined[-1].fail()
    except (GroupError, KeyboardInterrupt):
        pass
    return place.local_rank == 0


@cache
def _torchrun_store() -> Store:
    """Connect to the store of this process's group, which its first process holds or torchrun.

    On a thread: torch tries for minutes, in which the main one would hear of no signal.
    """
    connected: Future[Store] = Future()

    def connect() -> None:
        try:
            store, _rank, _size = next(rendezvous("env://", timeout=_STORE_TIMEOUT))
            connected.set_result(store)
        except BaseException as error:
            connected.set_exception(error)

    threading.Thread(target=connect, name="store", daemon=True).start()
    return connected.result()


@contextmanager
def _named_store() -> Iterator[None]:
    """Raise an error that says what was lost where the store is."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise GroupError(f"lost the store that joins the processes: {reason}") from error
