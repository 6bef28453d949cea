"""The smallest set of snapshots that frees so much. Pure.

Blocks are held by rows of consecutive snapshots, so a set frees, for each run of consecutive snapshots in
it, the rows that lie within. For such, dynamic programming by the number of snapshots finds the most that any set of
that size frees. Where rows of several volumes hold a block together, as with clones, that does not hold, and for
very many snapshots it takes too long: then a set is grown by what frees most for its size, and thinned again.
That may be larger than need be; :attr:`Choice.is_smallest` tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from .space import SpaceAccount

_WORK_MAX = 4_000_000
_TRIES_MAX = 20_000
# A table of what runs free has half the square of so many entries.
_TABLE_PLACES_MAX = 2000

_Freed = Callable[[int], int]


@dataclass(frozen=True, slots=True)
class Choice:
    """Snapshots by their instants, and the blocks that deleting all of them frees."""

    instants: list[int]
    freed_blocks: int
    is_smallest: bool


@dataclass(frozen=True, slots=True)
class _Held:
    """Blocks that only some candidates hold: those at the places of which ``mask`` has the bit."""

    mask: int
    count: int

    @property
    def first(self) -> int:
        """The first of these places."""
        return (self.mask & -self.mask).bit_length() - 1

    @property
    def size(self) -> int:
        """How many candidates hold them."""
        return self.mask.bit_count()

    @property
    def is_run(self) -> bool:
        """Whether the places are consecutive."""
        return (self.mask >> self.first) + 1 == 1 << self.size


def smallest_choice(account: SpaceAccount, candidates: Sequence[int], need_blocks: int) -> Choice | None:
    """The fewest of the candidates, by instant, that free so many blocks; None when all of them do not."""
    instants = sorted(candidates)
    held = _held_by(account, instants)
    if sum(one.count for one in held) < need_blocks:
        return None
    if need_blocks <= 0:
        return Choice([], 0, True)
    mask, is_smallest = _search(held, len(instants), need_blocks)
    chosen = [instants[place] for place in _places_in(mask)]
    return Choice(chosen, account.freed_blocks(chosen), is_smallest)


def _held_by(account: SpaceAccount, instants: Sequence[int]) -> list[_Held]:
    """Blocks that candidates alone hold, by which of them do."""
    place_of = {instant: place for place, instant in enumerate(instants)}
    prefixes = {group: _prefixes(of_group, place_of) for group, of_group in account.instants.items()}
    totals: dict[int, int] = {}
    for holders, count in account.counts.items():
        if holders.is_live or not holders.rows:
            continue
        mask = 0
        for row in holders.rows:
            masks, others = prefixes[row.group]
            if others[row.last + 1] != others[row.first]:
                break
            mask |= masks[row.last + 1] & ~masks[row.first]
        else:
            totals[mask] = totals.get(mask, 0) + count
    return [_Held(mask, count) for mask, count in totals.items()]


def _prefixes(instants: Sequence[int], place_of: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """Of the first none, one, two, ... of these instants: the places of those that are candidates; how many are not."""
    masks, others = [0], [0]
    for instant in instants:
        place = place_of.get(instant)
        masks.append(masks[-1] if place is None else masks[-1] | 1 << place)
        others.append(others[-1] + (place is None))
    return masks, others


def _search(held: list[_Held], place_count: int, need: int) -> tuple[int, bool]:
    are_runs = all(one.is_run for one in held)
    freed = _freed_by(held, place_count, are_runs=are_runs)
    few = _by_trying(held, freed, place_count, need)
    if few is not None:
        return few, True
    grown = _grown(held, freed, place_count, need)
    size = grown.bit_count()
    if are_runs and place_count * place_count * size <= _WORK_MAX:
        return _by_runs(held, place_count, need, size), True
    return grown, size == 1


def _freed_by(held: list[_Held], place_count: int, *, are_runs: bool) -> _Freed:
    """What a set of places frees. Of what is held by runs alone it is a sum over the runs in the set."""
    if are_runs and place_count <= _TABLE_PLACES_MAX:
        worth = _worth_of_runs(held, place_count)
        return lambda chosen: sum(worth(first, length) for first, length in _runs_in(chosen))
    return lambda chosen: sum(one.count for one in held if not one.mask & ~chosen)


def _runs_in(mask: int) -> Iterator[tuple[int, int]]:
    """Runs of bits, as place and length."""
    place = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        length = (~mask & (mask + 1)).bit_length() - 1
        yield place + skip, length
        mask >>= length
        place += skip + length


def _places_in(mask: int) -> list[int]:
    return [place for first, length in _runs_in(mask) for place in range(first, first + length)]


def _by_trying(held: list[_Held], freed: _Freed, place_count: int, need: int) -> int | None:
    """All sets, the small ones first, if there are few."""
    if 2**place_count * len(held) > _TRIES_MAX * 50 or 2**place_count > _TRIES_MAX:
        return None
    for size in range(1, place_count + 1):
        masks = (sum(1 << place for place in one) for one in combinations(range(place_count), size))
        best = max(masks, key=freed)
        if freed(best) >= need:
            return best
    return None


def _grown(held: list[_Held], freed: _Freed, place_count: int, need: int) -> int:
    """Take what frees most for each snapshot it costs, until it is enough; then leave out what is not needed."""
    chosen = 0
    # What lies within a set comes with it, so each set is worth all that its snapshots free together.
    worth = [(one.mask, freed(one.mask)) for one in _most(held)]
    while freed(chosen) < need:
        worth = [(mask, count) for mask, count in worth if mask & ~chosen]
        if not worth:
            chosen = (1 << place_count) - 1
            break
        best, _ = max(worth, key=lambda one: min(one[1], need) / (one[0] & ~chosen).bit_count())
        chosen |= best
    for place in _places_in(chosen):
        if freed(chosen & ~(1 << place)) >= need:
            chosen &= ~(1 << place)
    return chosen


def _most(held: list[_Held]) -> list[_Held]:
    """Some hundreds of those that count: each is compared with all."""
    return sorted(held, key=lambda one: -one.count / one.size)[:500] + sorted(held, key=lambda one: -one.size)[:100]


def _by_runs(held: list[_Held], place_count: int, need: int, size_max: int) -> int:
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


def _walk_back(came: list[list[int]], size: int, end: int) -> int:
    chosen = 0
    while size > 0:
        length = came[size][end]
        if not length:
            end -= 1
            continue
        chosen |= ((1 << length) - 1) << (end - length)
        size -= length
        end = max(0, end - length - 1)
    return chosen


def _worth_of_runs(held: list[_Held], place_count: int) -> Callable[[int, int], int]:
    """What a run of candidates frees, by first place and length, from sums over both ends."""
    table = [[0] * (place_count - first) for first in range(place_count)]
    for one in held:
        table[one.first][one.size - 1] += one.count
    for first in range(place_count - 1, -1, -1):
        row = table[first]
        for length in range(1, len(row)):
            row[length] += row[length - 1]
        if first + 1 < place_count:
            inner = table[first + 1]
            for length in range(1, len(row)):
                row[length] += inner[length - 1]
    return lambda first, length: table[first][length - 1]
