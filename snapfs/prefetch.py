"""What reads of an object will need next, brought into memory together: change logs, their files, checksums.

An object that was written to here and there between snapshots lies in as many change logs. One by one each of them
costs its first reader two turns in a thread; together they cost two in all. Only what there is room for is brought
in, so nothing has to leave memory for what may never be read; what fails here, its own reader is told.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Sequence
from itertools import islice

import trio

from .blockmap import HOLE, BlockMap
from .changelog import ChangeLog, ChangeLogs
from .errors import SnapfsError
from .formats import CHANGE_LOG
from .shardstate import ShardAccess

_LOGS_MAX = 256
# Opened in the event loop: requests have their turn after so many.
_OPENED_AT_ONCE = 16


async def prefetch(access: ShardAccess, logs: ChangeLogs, block_map: BlockMap, block: int, place: int) -> None:
    """Bring in what reads of an object need, from a block of it on; ``place`` is where it lies in the logs' files."""
    # Where others would have to leave memory even to look for what is not here would be in vain.
    if isinstance(block_map, int) or not logs.has_room:
        return
    log_ids = _ids_around(block_map, block)
    with contextlib.suppress(OSError, SnapfsError):
        await _look_at(access, logs, log_ids)
        await _open(logs, [log for one in log_ids if (log := logs.known.get(one)) is not None])
    await fetch_checksums(access, logs, log_ids, place)


async def fetch_checksums(access: ShardAccess, logs: ChangeLogs, log_ids: Sequence[int], place: int) -> None:
    """Bring in the checksums of an object in those of these logs that are open and sealed."""
    wanted = logs.sums.missing(log_ids, place)
    if len(wanted) > 1:
        with contextlib.suppress(OSError, SnapfsError):
            for log_id, sums in await access.ask(access.store.some_checksums, wanted, logs.sums.object_index(place)):
                logs.sums.admit(log_id, place, sums)


def _ids_around(block_map: array[int], block: int) -> list[int]:
    """The logs that a map names, from a block on and round to it; so many as are brought in at a time."""
    ids = dict.fromkeys(block_map[block:])
    ids.update(dict.fromkeys(block_map[:block]))
    ids.pop(HOLE, None)
    return list(islice(ids, _LOGS_MAX))


async def _look_at(access: ShardAccess, logs: ChangeLogs, log_ids: Sequence[int]) -> None:
    unknown = [one for one in log_ids if one not in logs.known][: logs.known_room]
    if unknown:
        for row in await access.ask(access.store.some_logs, unknown):
            logs.adopt(row)


async def _open(logs: ChangeLogs, wanted: Sequence[ChangeLog]) -> None:
    closed = [log for log in wanted if log.file is None and log.kind == CHANGE_LOG]
    for number, log in enumerate(closed[: logs.files_room]):
        if number % _OPENED_AT_ONCE == _OPENED_AT_ONCE - 1:
            await trio.lowlevel.checkpoint()
        if not logs.files_room:
            return
        if logs.known.get(log.log_id) is log and not log.liveness.is_over:
            with contextlib.suppress(OSError, SnapfsError):
                logs.open_file(log)
