"""Bounds of caches and of batches made so small that a few objects, logs and snapshots go over each of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from snapfs import (
    changelog,
    check,
    checksums,
    clones,
    counting,
    diff,
    namedblocks,
    objectdigests,
    portion,
    processor,
    reclaim,
    reclaimer,
    repair,
    restoring,
    scrub,
    sealedfile,
    sealer,
    sealing,
    shardstate,
    shardstore,
    snapshot,
    snapshots,
    space,
    unnamed,
    volume,
)

# So many files a batch of a read has open at once; a read may need more, and one more as it begins within a block.
_BATCH_BLOCKS = 2
_READ_BLOCKS = 4
_BOUNDS = (
    (changelog, "OPEN_FILES_MAX", 4),
    (checksums, "_RANGES_PAY_BLOCKS", 1),
    (changelog, "KNOWN_LOGS_MAX", 24),
    (check, "_MAPS_A_STEP", 1),
    (clones, "_FLATTEN_BATCH", 1),
    (counting, "_STEP", 1),
    (diff, "_SLICE", 1),
    (diff, "_BATCH", 1),
    (namedblocks, "_GAP_MAX", 1),
    (namedblocks, "_OBJECTS_A_STEP", 2),
    (namedblocks, "_ROWS_A_STEP", 3),
    (portion, "LOAD_WINDOW", 1),
    (portion, "_SEGMENTS_AT_ONCE", _BATCH_BLOCKS),
    (processor, "DIRTY_OBJECTS_MAX", 1),
    (processor, "_PUNCH_BATCH", 1),
    (reclaim, "_BATCH", 1),
    (reclaim, "_COPIES_A_STEP", 2),
    (reclaimer, "_RELEASED_AT_ONCE", 2),
    (repair, "_MAPS_A_STEP", 1),
    (restoring, "_RUN_BLOCKS_MAX", 3),
    (restoring, "_OBJECTS_A_COMMIT", 1),
    (scrub, "_OBJECTS_A_STEP", 1),
    (scrub, "_RUN_BLOCKS_MAX", 3),
    (sealedfile, "_KEPT_MIN", 2 * _BATCH_BLOCKS),
    (sealer, "_CONTENT_KEPT_INSTANTS", 1),
    (sealer, "_WAITING_MAX", 1),
    (sealer, "_SEALED_AT_ONCE", 1),
    (sealer, "_CONTENTS_MAX", 1),
    (sealing, "_STEP_BLOCKS", 1024),
    (sealing, "_RUN_BLOCKS_MAX", 3),
    (sealing, "_BATCH", 1),
    (sealing, "_LOT_LOGS", 2),
    (shardstore, "_SHORT_SPAN", 1),
    # A read reaches over two objects at most.
    (snapshot, "_MAPS_MAX", 2),
    (snapshots, "_MEMBERS_KEPT", 1),
    (space, "_COPIES_A_STEP", 2),
    (space, "_OBJECTS_A_STEP", 2),
    (unnamed, "_LOGS_MAX", 2),
    (unnamed, "_MASKS_MAX", 2),
    (volume, "READ_BYTES_MAX", _READ_BLOCKS * 4096),
    (volume, "_TRIM_BATCH", 1),
    (volume, "_TRIM_COMMIT_OBJECTS", 1),
)


@contextlib.contextmanager
def cramped() -> Iterator[None]:
    """Small bounds until the block ends."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name, bound in _BOUNDS:
            assert hasattr(module, name), (module, name)
            patch.setattr(module, name, bound)
        for function, bound in (
            # A write of 5 MiB reaches over three objects.
            (shardstate.Residency.__init__, 4),
            (sealedfile.SumCache.__init__, 1),
            (objectdigests.ObjectDigests.__init__, 1),
        ):
            assert function.__defaults__ is not None and len(function.__defaults__) == 1
            patch.setattr(function, "__defaults__", (bound,))
        yield
