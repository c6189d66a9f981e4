"""How the batches of a run are cut into tickets, and handed out."""

import heapq

import pytest

from dump_activations.pipeline.tickets import cut_tickets

MISSING = [(range(1000),), (range(3, 4), range(10, 500), range(600, 1001)), (range(7),), ()]


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("processes", [1, 2, 32])
@pytest.mark.parametrize("largest_nbytes", [1, 5 << 20, 1 << 30])
def test_tickets_are_all_of_the_missing_batches_in_order(missing, processes, largest_nbytes):
    tickets = [*cut_tickets(missing, processes=processes, largest_nbytes=largest_nbytes)]
    assert [b for ticket in tickets for b in ticket] == [b for stretch in missing for b in stretch]
    assert all(any(set(ticket) <= set(stretch) for stretch in missing) for ticket in tickets)
    # No more than is written in one go, but for a batch that is larger by itself.
    assert all(len(ticket) == 1 or len(ticket) * largest_nbytes <= 64 << 20 for ticket in tickets)


def test_the_first_tickets_are_large_and_the_last_ones_single_batches():
    tickets = [*cut_tickets([range(10_000)], processes=4, largest_nbytes=1 << 20)]
    assert {len(ticket) for ticket in tickets[:100]} == {64}
    assert len(tickets[-1]) == 1
    assert len(tickets) < 500


@pytest.mark.parametrize("processes", [2, 4, 8])
@pytest.mark.parametrize("batches", [400, 5000])
def test_a_process_at_half_speed_costs_a_few_per_cent(processes, batches):
    """Each holds the ticket that it does and the one whose boards it reads meanwhile."""
    tickets = iter(cut_tickets([range(batches)], processes=processes, largest_nbytes=1 << 20))
    seconds = [2.0] + [1.0] * (processes - 1)
    held = [next(tickets) for _ in range(processes)]
    turns = [(0.0, rank) for rank in range(processes)]  # when each begins the ticket that it holds
    end = 0.0
    while turns:
        now, rank = heapq.heappop(turns)
        ticket, held[rank] = held[rank], next(tickets, range(0))
        if ticket:
            done = now + len(ticket) * seconds[rank]
            end = max(end, done)
            heapq.heappush(turns, (done, rank))
    ideal = batches / sum(1 / each for each in seconds)
    assert ideal - 2 <= end <= ideal * 1.05
