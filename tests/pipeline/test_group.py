"""What the processes of a run tell one another: here each is a thread, with one local store."""

import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from dump_activations.errors import GroupError
from dump_activations.pipeline import group as group_module
from dump_activations.pipeline.group import Group
from dump_activations.place import Place


class Late(HashStore):
    """A store in which what is said is heard only some looks later, as from far away."""

    def check(self, keys):
        time.sleep(0.001)
        return super().check(keys)


@pytest.fixture
def store():
    return Late()


@pytest.fixture
def meet(store):
    """Return what lets so many processes meet and do the same."""

    def run(size, act=lambda group: group, restarts=None):
        def be(rank):
            return act(Group(Place(rank, size, restarts=(restarts or [0] * size)[rank]), store))

        with ThreadPoolExecutor(size) as executor:
            return [*executor.map(be, range(size))]

    return run


def test_each_ticket_is_taken_once(meet):
    tickets = [range(i, i + 1) for i in range(200)]
    taken = meet(4, lambda group: [*group.take(tickets)])
    assert sorted((each for some in taken for each in some), key=min) == tickets
    assert all(some == sorted(some, key=min) for some in taken)


def test_what_an_earlier_run_left_in_the_store_counts_for_nothing(meet, store):
    """Nor does a process that came to an earlier meeting and was killed there."""
    tickets = [range(1)]
    store.set("dump_activations/here/1", "12345")
    for _ in range(3):
        groups = meet(3)
        assert [each for group in groups for each in group.take(tickets)] == tickets
        groups[2].fail()
        with pytest.raises(GroupError, match="rank 2 failed"):
            groups[0].check()


@pytest.mark.parametrize("restarts", [[0, 0, 0], [0, 1, 0], [2, 0, 0]])
def test_all_know_of_a_restart(restarts, meet):
    """The launchers of other machines do not count those of this one."""
    assert {group.restarted for group in meet(3, restarts=restarts)} == {any(restarts)}


def test_one_is_the_first_to_fail_and_all_others_hear_of_it(meet):
    groups = meet(3)

    def wait(group):
        with pytest.raises(GroupError, match="rank 1 failed"), group:
            group.hear("token", 0)

    with ThreadPoolExecutor(2) as executor:
        waiting = [executor.submit(wait, groups[rank]) for rank in (0, 2)]
        time.sleep(0.02)
        with pytest.raises(ZeroDivisionError), groups[1]:
            raise ZeroDivisionError
        for each in waiting:
            each.result(10)
    assert [group.failed_first for group in groups] == [False, True, False]


def test_a_failure_is_heard_of_before_the_file_is_completed(meet):
    """Whoever fails may have left already."""
    first, second = meet(2)
    second.fail()
    second.leave()
    with pytest.raises(GroupError, match="rank 1 failed"):
        first.wait_until_left()


def test_waiting_ends_without_progress_only(meet, monkeypatch):
    monkeypatch.setattr(group_module, "_PATIENCE", 0.2)
    first, second = meet(2)
    with ThreadPoolExecutor(1) as executor:
        waiting = executor.submit(partial(first.hear, "left/1", 1))
        for _ in range(6):
            time.sleep(0.1)
            second.report()
        assert not waiting.done()
        with pytest.raises(GroupError, match="in vain for rank 1"):
            waiting.result(10)


@pytest.mark.parametrize("text", ["", "-1", "9223372036854775808", "a\nb", "1.0"])
def test_what_is_no_number_is_refused(text, meet, store):
    (group,) = meet(1)
    group.say("token", (1 << 63) - 1)
    assert group.heard("token") == (1 << 63) - 1
    store.set(f"{group._prefix}token", text)
    with pytest.raises(GroupError, match=r"the store of the processes holds .* as token"):
        group.heard("token")


def test_progress_is_of_all(meet):
    first, second = meet(2)
    assert first.advance(3) == 3
    second.advance(4)
    second.report()
    assert first.advance(1) in (4, 8)
    assert first.report() == 8


def test_a_store_that_is_lost_is_named(meet, monkeypatch):
    (group,) = meet(1)

    def lose(*_):
        raise RuntimeError("Connection reset\nby peer")

    monkeypatch.setattr(group, "_store", SimpleNamespace(add=lose))
    with pytest.raises(GroupError, match=r"lost the store .*: Connection reset$"):
        group.count("ticket")
