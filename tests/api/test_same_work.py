"""Whether processes do the same work: here each is a thread, with one local store."""

from concurrent.futures import ThreadPoolExecutor, wait

import pytest
from torch.distributed import HashStore

from dump_activations.api.same_work import check_same_work
from dump_activations.errors import GroupError
from dump_activations.pipeline.group import Group
from dump_activations.place import Place

WORK = {"seed": "0", "n_samples": "8"}


@pytest.fixture
def executor():
    with ThreadPoolExecutor(3) as executor:
        yield executor


@pytest.fixture
def groups(executor):
    store = HashStore()
    return [*executor.map(lambda rank: Group(Place(rank, 3), store), range(3))]


@pytest.mark.parametrize("of_slow", [WORK, WORK | {"seed": "1"}], ids=["same", "other"])
def test_the_first_waits_until_all_have_compared(of_slow, groups, executor):
    """Else there is a file with batches by the time that a slow process finds a difference."""
    first, second, slow = groups
    leading = executor.submit(check_same_work, first, WORK)
    check_same_work(second, WORK)
    wait([leading], 0.2)
    assert not leading.done()
    if of_slow == WORK:
        check_same_work(slow, of_slow)
        leading.result(10)
        return
    with pytest.raises(GroupError, match=r"rank 2 differs from rank 0 in seed$"), slow:
        check_same_work(slow, of_slow)
    with pytest.raises(GroupError, match="rank 2 failed"):
        leading.result(10)
