"""The catalog, and the lock under which one thread at a time uses it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, TypeVar

import trio

from .catalog import Catalog
from .formats import CatalogBatch, VersionRow, VolumeRow
from .pending import PendingCalls
from .tasks import in_thread

T = TypeVar("T")


class Recorded(Protocol):
    """A volume, as far as the catalog keeps it."""

    versions: list[VersionRow]

    def unsaved_row(self) -> VolumeRow | None:
        """The row to be saved; None if it is saved, or gone."""
        ...

    def needed_versions(self) -> list[VersionRow]:
        """Kept attributes to be saved, those that a snapshot still needs."""
        ...

    def saved(self, row: VolumeRow | None, version_count: int) -> None:
        """The row, and that many of the first ``versions``, are durable."""
        ...


class CatalogAccess:
    """Serialises commits and queries of the catalog."""

    WHERE = "catalog"

    def __init__(self, catalog: Catalog, pending: PendingCalls) -> None:
        self.catalog = catalog
        self._pending = pending
        self._lock = trio.Lock()
        self._limiter = trio.CapacityLimiter(1)

    @property
    def generation(self) -> int:
        """A generation that the catalog has reached durably."""
        return self.catalog.generation

    @property
    def is_settled(self) -> bool:
        """Whether all commits that failed are sure not to be found after a power cut."""
        return self.catalog.database.is_settled

    async def settle(self) -> None:
        """See to that. Raises what a commit raises; then nothing may be acknowledged, and nothing given back."""
        if not self.is_settled:
            with trio.CancelScope(shield=True):
                await self.ask(self.catalog.database.settle)

    async def ask(self, call: Callable[..., T], *args: object) -> T:
        """Run a query in a thread."""
        async with self._lock:
            return await self._in_thread(call, *args)

    async def _in_thread(self, call: Callable[..., T], *args: object) -> T:
        with self._pending.running(self.WHERE, call) as one:
            return await in_thread(one.run, call, *args, limiter=self._limiter)

    async def save(self, volumes: Iterable[Recorded], make_batch: Callable[[], CatalogBatch] = CatalogBatch) -> None:
        """Commit what is unsaved of these volumes, with the rows of a batch.

        The batch is made when the catalog's turn has come. Raises NoSpaceError, UnreadableError or
        DamagedError, with nothing changed.
        """
        with trio.CancelScope(shield=True):
            async with self._lock:
                batch = make_batch()
                taken = []
                for volume in volumes:
                    row = volume.unsaved_row()
                    if row is not None or volume.versions:
                        taken.append((volume, row, len(volume.versions)))
                        batch.versions += volume.needed_versions()
                        if row is not None:
                            batch.volumes.append(row)
                if not _has_rows(batch):
                    return
                await self._in_thread(self.catalog.commit, batch)
                for volume, row, version_count in taken:
                    volume.saved(row, version_count)

    async def close(self) -> None:
        """Close the catalog."""
        await self.ask(self.catalog.close)


def _has_rows(batch: CatalogBatch) -> bool:
    return any(getattr(batch, name) for name in batch.__dataclass_fields__)
