"""Which syncs an fsync causes, and in which order: seen from outside, by strace."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import Mounted, run, traced, wait_until

pytestmark = pytest.mark.mount
BLOCK = 4096
_SYNC = re.compile(r"(?:fsync|fdatasync)\(\d+<([^>]*)>\)?.*")


def _kind(path: str) -> str:
    return "log" if "/logs" in path else os.path.basename(path).split(".")[0].rstrip("0123456789") or "shard"


def test_an_fsync_syncs_data_before_maps_before_sizes_and_nothing_that_did_not_change(
    mounted: Mounted, tmp_path: Path
) -> None:
    path = mounted.path / "v"
    path.write_bytes(b"a" * 4 * BLOCK)
    mounted.snapshot("s")
    # The sealing of the snapshot has syncs of its own.
    wait_until(lambda: mounted.status()["unsealed_snapshot_count"] == 0, "the snapshot is sealed")
    fd = os.open(path, os.O_RDWR)
    try:

        def synced(step: Callable[[], object], name: str) -> list[str]:
            told = tmp_path / name
            with traced(mounted, "fdatasync,fsync", told):
                step()
            kinds = [_kind(found[1]) for found in map(_SYNC.search, told.read_text().splitlines()) if found]
            # A new log's file and its folders, say: how many of a kind in a row does not count.
            return [kind for kind, _ in itertools.groupby(kinds)]

        def write(offset: int, sync: Callable[[int], None]) -> Callable[[], None]:
            def step() -> None:
                os.pwrite(fd, b"b" * BLOCK, offset)
                sync(fd)

            return step

        # The attributes of before, too, are kept for the snapshot.
        assert synced(write(0, os.fdatasync), "first") == ["log", "shard", "catalog"]
        assert synced(write(BLOCK, os.fdatasync), "another block") == ["log", "shard"]
        assert synced(write(0, os.fdatasync), "again") == ["log"]
        assert synced(write(64 * BLOCK, os.fsync), "longer") == ["log", "shard", "catalog"]
        assert synced(lambda: os.fdatasync(fd), "nothing") == []
    finally:
        os.close(fd)
    mounted.unmount()
    mounted.check()


def test_commands_that_change_a_volume_are_durable_when_they_return(mounted: Mounted, tmp_path: Path) -> None:
    path = mounted.path / "v"
    path.write_bytes(b"a" * 16 * BLOCK)
    run("sync", path)
    for number, line in enumerate(("discard v 0 16384", "resize v 1M", "discard v 16384 4096 sync=no")):
        told = tmp_path / f"strace{number}"
        with traced(mounted, "fdatasync,fsync", told), open(mounted.control_path, "r+b", buffering=0) as control:
            control.write(line.encode() + b"\n")
        kinds = [_kind(found[1]) for found in map(_SYNC.search, told.read_text().splitlines()) if found]
        # The last one leaves it to the volume's next sync.
        assert [kind in kinds for kind in ("shard", "catalog")] == [number == 0, number < 2], (line, kinds)
