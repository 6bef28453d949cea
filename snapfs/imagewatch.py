"""Whether images that volumes stand on were changed by others while the pool was not open."""

from __future__ import annotations

import logging

from .catalogaccess import CatalogAccess
from .errors import SnapfsError
from .events import EventLog
from .formats import COPY_ON_WRITE, CatalogBatch, VolumeTraits
from .making import source_mtime_ns
from .placement import Placement
from .tasks import in_thread
from .traits import TraitsTable


class ImageWatch:
    """Compares images with what was noted of them. ``changed`` has the paths of those that differ."""

    def __init__(self, catalog: CatalogAccess, traits: TraitsTable, placement: Placement, events: EventLog) -> None:
        self.changed: list[str] = []
        self._catalog = catalog
        self._traits = traits
        self._placement = placement
        self._events = events

    async def look(self, *, after_crash: bool) -> None:
        """After opening: tell which images are missing or were changed meanwhile.

        After a crash the last writes of snapfs itself were not noted, so only what is never
        written is compared.
        """
        for row in self._with_image():
            found = await in_thread(self._look_at, row)
            if isinstance(found, SnapfsError):
                self._events.note("image-missing", logging.ERROR, path=row.source_path, reason=str(found))
            elif found != row and not (after_crash and row.change_mode == COPY_ON_WRITE):
                self.changed.append(row.source_path)
                self._events.note(
                    "image-changed",
                    logging.ERROR,
                    path=row.source_path,
                    reason="it was changed while the pool was not open; snapshots that stand on it may differ",
                )

    async def note(self) -> None:
        """Before closing, with everything written: note what images are like that are written over."""
        found = [await in_thread(self._look_at, row) for row in self._with_image() if row.change_mode == COPY_ON_WRITE]
        rows = [row for row in found if isinstance(row, VolumeTraits) and row != self._traits.get(row.volume_id)]
        if rows:
            await self._catalog.save([], lambda: CatalogBatch(traits=rows))

    def _with_image(self) -> list[VolumeTraits]:
        return [row for row in self._traits.rows.values() if row.source_path]

    def _look_at(self, row: VolumeTraits) -> VolumeTraits | SnapfsError:
        try:
            file = self._placement.open_image(row.volume_id, 0)
        except SnapfsError as error:
            return error
        try:
            return row._replace(
                source_size_bytes=file.size(), source_mtime_ns=source_mtime_ns(row.source_path) or row.source_mtime_ns
            )
        finally:
            file.close()
