"""Has the kernel hand over its dirty pages before a snapshot's cut.

With the write-back cache a write that returned may be in the kernel only. An fsync on the daemon's
own mount writes its pages back while the loop goes on serving; so it runs in a thread. Only volumes
that are open for writing can have any. The daemon opens them by id, and its own fsync is not taken
for a wish that data be durable: the snapshot does that.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

import trio

from ..errors import NotFoundError
from ..geometry import VolumeId
from ..volume import Volume
from .names import META_NAME
from .namespace import Namespace

T = TypeVar("T")


class PageFlusher:
    """Flushes the kernel's pages of volumes of one mount."""

    def __init__(self, namespace: Namespace, mount_point: str) -> None:
        self._namespace = namespace
        self._folder = os.path.join(os.fsencode(mount_point), META_NAME)
        self._limiter = trio.CapacityLimiter(4)

    def path_of(self, volume_id: VolumeId) -> bytes:
        """Where the daemon finds a volume whatever its name is."""
        return os.path.join(self._folder, b"%d" % volume_id)

    async def flush(self, volumes: Sequence[Volume]) -> None:
        """Write back the pages of those volumes that have a writer. Raises OSError."""
        wanted = [one.volume_id for one in volumes if one.volume_id in self._namespace.writer_counts]
        if wanted:
            await self.in_own_thread(self._flush, wanted)

    def _flush(self, volume_ids: list[VolumeId]) -> None:
        for volume_id in volume_ids:
            try:
                fd = os.open(self.path_of(volume_id), os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    async def resize(self, name: bytes, size_bytes: int) -> None:
        """Set a volume's size through the kernel, which trusts its own idea of it. Raises OSError."""
        volume = self._namespace.pool.volumes.by_name.get(name)
        if volume is None:
            raise NotFoundError("the volume is gone")
        await self.in_own_thread(os.truncate, self.path_of(volume.volume_id), size_bytes)

    async def in_own_thread(self, call: Callable[..., T], *args: object) -> T:
        """Run a call on the daemon's own mount in a thread that the namespace knows as ours."""

        def run() -> T:
            own_id = threading.get_native_id()
            self._namespace.flusher_ids.add(own_id)
            try:
                return call(*args)
            finally:
                self._namespace.flusher_ids.discard(own_id)

        return await trio.to_thread.run_sync(run, limiter=self._limiter)
