"""The smallest set of snapshots that frees so much. Pure.

Blocks are held by rows of consecutive snapshots, so a set frees, for each run of consecutive snapshots in
it, the rows that lie within. For such, dynamic programming by the number of snapshots finds the most that any set of
that size frees. Where rows of several volumes hold a block together, as with clones, that does not hold, and for
very many snapshots it takes too long: then a set is grown by what frees most for its size, and thinned again.
That may be larger than need be; :attr:`Choice.is_smallest` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

from .space import SpaceAccount

_WORK_MAX = 4_000_000
_TRIES_MAX = 20_000


@dataclass(frozen=True, slots=True)
class Choice:
    """Snapshots by their instants, and the blocks that deleting all of them frees."""

    instants: list[int]
    freed_blocks: int
    is_smallest: bool


@dataclass(frozen=True, slots=True)
class _Held:
    """Blocks that only the candidates at these places hold."""

    places: frozenset[int]
    count: int


def smallest_choice(account: SpaceAccount, candidates: Sequence[int], need_blocks: int) -> Choice | None:
    """The fewest of the candidates, by instant, that free so many blocks; None when all of them do not."""
    instants = sorted(candidates)
    held = _held_by(account, instants)
    if sum(one.count for one in held) < need_blocks:
        return None
    if need_blocks <= 0:
        return Choice([], 0, True)
    places, is_smallest = _search(held, len(instants), need_blocks)
    chosen = [instants[place] for place in sorted(places)]
    return Choice(chosen, account.freed_blocks(chosen), is_smallest)


def _held_by(account: SpaceAccount, instants: Sequence[int]) -> list[_Held]:
    """Blocks that candidates alone hold, by which of them do."""
    place_of = {instant: place for place, instant in enumerate(instants)}
    totals: dict[frozenset[int], int] = {}
    for holders, count in account.counts.items():
        if holders.is_live or not holders.rows:
            continue
        places: set[int] = set()
        for row in holders.rows:
            of_row = account.instants[row.group][row.first : row.last + 1]
            if any(instant not in place_of for instant in of_row):
                break
            places.update(place_of[instant] for instant in of_row)
        else:
            key = frozenset(places)
            totals[key] = totals.get(key, 0) + count
    return [_Held(places, count) for places, count in totals.items()]


def _search(held: list[_Held], place_count: int, need: int) -> tuple[set[int], bool]:
    few = _by_trying(held, place_count, need)
    if few is not None:
        return few, True
    are_rows = all(max(one.places) - min(one.places) + 1 == len(one.places) for one in held)
    grown = _grown(held, need)
    if are_rows and place_count * place_count * len(grown) <= _WORK_MAX:
        return _by_runs(held, place_count, need, len(grown)), True
    return grown, len(grown) == 1


def _freed(held: list[_Held], chosen: set[int]) -> int:
    return sum(one.count for one in held if one.places <= chosen)


def _by_trying(held: list[_Held], place_count: int, need: int) -> set[int] | None:
    """All sets, the small ones first, if there are few."""
    if 2**place_count * len(held) > _TRIES_MAX * 50 or 2**place_count > _TRIES_MAX:
        return None
    for size in range(1, place_count + 1):
        best = max(
            (set(one) for one in combinations(range(place_count), size)), key=lambda chosen: _freed(held, chosen)
        )
        if _freed(held, best) >= need:
            return best
    return None


def _grown(held: list[_Held], need: int) -> set[int]:
    """Take what frees most for each snapshot it costs, until it is enough; then leave out what is not needed."""
    chosen: set[int] = set()
    # What lies within a set comes with it, so each set is worth all that its snapshots free together.
    worth = [(one.places, sum(other.count for other in held if other.places <= one.places)) for one in _most(held)]
    while _freed(held, chosen) < need:
        left = [(places, count) for places, count in worth if not places <= chosen]
        if not left:
            break
        places, _ = max(left, key=lambda one: min(one[1], need) / len(one[0] - chosen))
        chosen |= places
    for place in sorted(chosen):
        if _freed(held, chosen - {place}) >= need:
            chosen.discard(place)
    return chosen


def _most(held: list[_Held]) -> list[_Held]:
    """Some hundreds of those that count: each is compared with all."""
    return (
        sorted(held, key=lambda one: -one.count / len(one.places))[:500]
        + sorted(held, key=lambda one: -len(one.places))[:100]
    )


def _by_runs(held: list[_Held], place_count: int, need: int, size_max: int) -> set[int]:
    """The smallest set, when all that is held is held by rows of consecutive candidates.

    ``best[size][place]`` is the most that ``size`` of the candidates before ``place`` free, the last run of
    them ended; a run from ``first`` on, ``length`` long, frees ``worth(first, length)``.
    """
    worth = _worth_of_runs(held, place_count)
    best: list[list[int]] = [[0] * (place_count + 2)]
    came: list[list[int]] = [[0] * (place_count + 2)]
    for size in range(1, size_max + 1):
        row = [-1] * (place_count + 2)
        length_of = [0] * (place_count + 2)
        for end in range(1, place_count + 1):
            # Not chosen at ``end - 1``: as before. Else a run ends there, with a gap before it.
            row[end], length_of[end] = row[end - 1], 0
            for length in range(1, min(size, end) + 1):
                before = best[size - length][max(0, end - length - 1)]
                if before < 0 or (size - length and end - length - 1 < 0):
                    continue
                found = before + worth(end - length, length)
                if found > row[end]:
                    row[end], length_of[end] = found, length
        best.append(row)
        came.append(length_of)
        if row[place_count] >= need:
            return _walk_back(came, size, place_count)
    raise AssertionError("the grown set is one of these")


def _walk_back(came: list[list[int]], size: int, end: int) -> set[int]:
    chosen: set[int] = set()
    while size > 0:
        length = came[size][end]
        if not length:
            end -= 1
            continue
        chosen.update(range(end - length, end))
        size -= length
        end = max(0, end - length - 1)
    return chosen


def _worth_of_runs(held: list[_Held], place_count: int) -> Callable[[int, int], int]:
    """What a run of candidates frees, by first place and length, from sums over both ends."""
    table = [[0] * (place_count - first) for first in range(place_count)]
    for one in held:
        table[min(one.places)][len(one.places) - 1] += one.count
    for first in range(place_count - 1, -1, -1):
        row = table[first]
        for length in range(1, len(row)):
            row[length] += row[length - 1]
        if first + 1 < place_count:
            inner = table[first + 1]
            for length in range(1, len(row)):
                row[length] += inner[length - 1]
    return lambda first, length: table[first][length - 1]
