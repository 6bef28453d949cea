"""Clients side by side in many orders. ``contrib/soak races`` has other seeds."""

from __future__ import annotations

import pytest

from .races import History, race

SEEDS = 60
STEPS = 40


@pytest.mark.parametrize("part", range(3))
def test_every_order_is_linearizable_and_every_snapshot_a_cut(part: int) -> None:
    for seed in range(part, SEEDS, 3):
        counts = race(seed, STEPS)
        assert sum(counts.values()) >= 5 * STEPS


def test_a_seed_gives_the_same_order_again() -> None:
    assert race(7, 20) == race(7, 20)


def test_what_is_not_linearizable_is_found() -> None:
    history = History()
    register = (b"a", 0)
    for _ in range(2):
        (write,) = history.begin([register])
        write.ended = history.tick()
    history.check_read(register, 2, history.tick(), history.tick())
    with pytest.raises(AssertionError, match="written over"):
        history.check_read(register, 1, history.tick(), history.tick())
    (other,) = history.begin([(b"a", 1)])
    other.ended = history.tick()
    with pytest.raises(AssertionError, match="has 1 but not"):
        history.check_cut({register: 1, (b"a", 1): 3})
