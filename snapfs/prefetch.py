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
from .geometry import VolumeId
from .shardstate import ShardAccess

_LOGS_MAX = 256


class Prefetcher:
    """What is being brought in on one processor, so that readers of one object who come together do it once."""

    __slots__ = ("_access", "_logs", "_under_way")

    def __init__(self, access: ShardAccess, logs: ChangeLogs) -> None:
        self._access = access
        self._logs = logs
        self._under_way: dict[tuple[VolumeId, int], trio.Event] = {}

    async def bring_in(self, volume_id: VolumeId, block_map: BlockMap, block: int, place: int) -> None:
        """Bring in what reads of an object need, from a block of it on; ``place`` is where it lies in the logs' files.

        Somebody else who is at the same object is waited for: what is missing then, the reader's own fetch brings.
        """
        # Where others would have to leave memory even to look for what is not here would be in vain.
        if isinstance(block_map, int) or not self._logs.has_room:
            return
        key = volume_id, place
        others = self._under_way.get(key)
        if others is not None:
            await others.wait()
            return
        done = self._under_way[key] = trio.Event()
        try:
            await self._bring_in(_ids_around(block_map, block), place)
        finally:
            del self._under_way[key]
            done.set()

    async def _bring_in(self, log_ids: Sequence[int], place: int) -> None:
        with contextlib.suppress(OSError, SnapfsError):
            await _look_at(self._access, self._logs, log_ids)
            await self._open([log for one in log_ids if (log := self._logs.known.get(one)) is not None])
        await fetch_checksums(self._access, self._logs, log_ids, place)

    async def _open(self, wanted: Sequence[ChangeLog]) -> None:
        closed = [log for log in wanted if log.file is None and log.kind == CHANGE_LOG and not log.liveness.is_over]
        closed = closed[: self._logs.files_room]
        if closed:
            for log, file in await self._access.read_in_thread(self._logs.open_apart, closed):
                self._logs.admit_file(log, file)


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
