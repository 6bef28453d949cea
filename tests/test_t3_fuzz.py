"""Garbage in: errors in words come out. ``contrib/soak fuzz`` has other seeds."""

from __future__ import annotations

import pytest
import trio

from snapfs.errors import BadCommandError, DamagedError
from snapfs.formats import PoolDescriptor
from snapfs.schedule import make_schedule

from .fuzz import POOL, fuzz_commands, fuzz_readers

READ_INPUTS = 60_000
LINES = 45_000


@pytest.mark.parametrize("seed", range(2))
def test_what_is_read_gives_a_value_or_an_error_in_words(seed: int) -> None:
    fuzz_readers(seed, READ_INPUTS // 2)


@pytest.mark.parametrize("seed", range(3))
def test_any_line_of_the_control_file_is_answered(seed: int) -> None:
    assert trio.run(fuzz_commands, seed, LINES // 3) > LINES // 30


def test_a_format_version_is_a_number() -> None:
    with pytest.raises(DamagedError):
        PoolDescriptor.from_json(POOL.to_json().replace(b'"format_version": 4', b'"format_version": true'), "here")


def test_a_schedule_has_a_name_in_utf_8() -> None:
    with pytest.raises(BadCommandError, match="UTF-8"):
        make_schedule("\udcff", "15m")
