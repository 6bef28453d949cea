"""Clients side by side on devices that fail, until power is lost. ``contrib/soak storms`` has other seeds."""

from __future__ import annotations

from collections import Counter

import pytest

from .storm import Change, Register, storm

SEEDS = 18
STEPS = 40


@pytest.mark.parametrize("part", range(3))
def test_what_is_left_of_a_storm_is_what_may_be(part: int) -> None:
    failed: Counter[str] = Counter()
    for seed in range(part, SEEDS, 3):
        counts, _, faults = storm(seed, STEPS)
        assert sum(counts.values()) >= 4 * STEPS
        failed += faults
    assert failed, "no call to a device failed"


def test_what_was_written_over_durably_is_not_allowed() -> None:
    first, second = Change(0, 0, 0, is_sure=True), Change(7, 1, 2, is_sure=True)
    register = Register([first, second, Change(8, 3, 4), Change(9, 6, 7, is_sure=True)])
    assert [register.allows(value, 5, 5) for value in (0, 7, 8)] == [False, True, True]
    # One that is not sure to have happened takes nothing away; what came behind all, and is over, does.
    assert [register.allows(value, 9, 10) for value in (7, 8, 9)] == [False, False, True]
    # After a power cut: what was durable at 5 is there, or something later.
    assert [register.allows(value, 9, 10, latest=5) for value in (0, 7, 8, 9)] == [False, True, True, True]
