"""Files of a pool are flipped, cut, emptied, scrambled, exchanged, removed. ``contrib/soak damage`` has other seeds."""

from __future__ import annotations

import pytest

from snapfs.backends import MemoryDevice
from snapfs.database import Database
from snapfs.errors import DamagedError

from .damage import Damages, judge_damage

CASES = 500


@pytest.mark.parametrize("part", range(4))
def test_damage_is_told_and_nothing_wrong_is_read(part: int) -> None:
    damages = Damages()
    told = 0
    for seed in range(part * CASES, (part + 1) * CASES):
        outcome = damages.strike(seed)
        judge_damage(outcome)
        told += outcome.is_told_by_check or outcome.is_told_at_opening or outcome.is_told_by_verify
    assert told > CASES // 2


def test_a_page_that_lost_its_rows_is_not_taken_for_an_empty_one() -> None:
    device = MemoryDevice()
    database = Database(device, "x.sqlite", "x", create_schemas=["CREATE TABLE t (n INTEGER NOT NULL) STRICT"])
    with database.transaction():
        database.each("INSERT INTO t VALUES (?)", [(n,) for n in range(100)])
    database.close()
    file = device.open("x.sqlite")
    # The second page is the table's; at 3 it has the count of its rows.
    file.write(bytes(2), 4096 + 3)
    file.close()
    with pytest.raises(DamagedError, match="x is damaged"):
        Database(device, "x.sqlite", "x")
