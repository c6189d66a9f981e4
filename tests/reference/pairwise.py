"""Few cases of many settings: each pair of values meets in one of them."""

from collections import Counter
from collections.abc import Hashable, Sequence
from itertools import combinations


def pairs_of(case: Sequence[Hashable]) -> set[tuple[tuple[int, Hashable], ...]]:
    """Return the pairs of values in a case, each value with the place of its factor."""
    return set(combinations(enumerate(case), 2))


def pairwise(
    *factors: Sequence[Hashable], never: Sequence[frozenset[Hashable]] = ()
) -> list[tuple[Hashable, ...]]:
    """Return cases, one value of each factor, that hold every pair of values but those in `never`.

    Greedy: the same cases at every call, and not the fewest possible. No value may be ruled
    out by any two others.
    """
    places = [(i, value) for i, values in enumerate(factors) for value in values]
    open_pairs = dict.fromkeys(
        (a, b)
        for a, b in combinations(places, 2)
        if a[0] != b[0] and frozenset((a[1], b[1])) not in never
    )
    used: Counter[tuple[int, Hashable]] = Counter()
    cases = []

    def worth(place: tuple[int, Hashable], case: dict[int, Hashable]) -> tuple[bool, int, int]:
        pairs = [tuple(sorted((place, other), key=lambda p: p[0])) for other in case.items()]
        possible = not any(frozenset((a[1], b[1])) in never for a, b in pairs)
        return possible, sum(pair in open_pairs for pair in pairs), -used[place]

    while open_pairs:
        case = dict(next(iter(open_pairs)))
        for i, values in enumerate(factors):
            if i not in case:
                case[i] = max(values, key=lambda value, i=i: worth((i, value), case))
        cases.append(tuple(case[i] for i in range(len(factors))))
        used.update(case.items())
        for pair in pairs_of(cases[-1]):
            open_pairs.pop(pair, None)
    return cases
