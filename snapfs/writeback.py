"""Large writes of new data begin to go to their device early.

The kernel begins by itself when a tenth of the memory is dirty, or after half a minute (vm.dirty_background_ratio and
vm.dirty_expire_centisecs, https://docs.kernel.org/admin-guide/sysctl/vm.html). Until then a device is idle while a
volume is filled, and the sync at the end waits for all of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

from .changelog import ChangeLog, in_use
from .errors import NoMemoryError
from .tasks import Wakeup

# New blocks of one write for it to count. Scattered ones are left to the kernel: they may be written over soon.
LARGE_BLOCKS_MIN = 32
# 4 MiB: with less there are more threads for the same, with 8 a few percent are lost again.
_BEGIN_BLOCKS = 1024


class EarlyWriteback:
    """The change logs of one processor whose device is to begin to write; ``run`` is the task that has it begin.

    It promises nothing: a failure is told by the log's next sync. ``in_thread`` runs a call that blocks.
    """

    def __init__(self, in_thread: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        self._in_thread = in_thread
        self._due: dict[int, ChangeLog] = {}
        self._wakeup = Wakeup()

    def note(self, log: ChangeLog, block_count: int) -> None:
        """So many blocks were written at once where nothing was before."""
        log.unbegun_block_count += block_count
        if log.unbegun_block_count >= _BEGIN_BLOCKS:
            log.unbegun_block_count = 0
            self._due[log.log_id] = log
            self._wakeup.set()

    async def run(self) -> None:
        """Have devices begin whenever there is enough; until cancelled."""
        while True:
            await self._wakeup.wait()
            while self._due:
                _, log = self._due.popitem()
                await self._begin(log)

    async def _begin(self, log: ChangeLog) -> None:
        if log.file is None:
            # Synced, and closed since.
            return
        with in_use([log]), contextlib.suppress(OSError, NoMemoryError):
            await self._in_thread(log.file.begin_writeback)
