"""Pools that a released version wrote: today's code opens them and finds what was in them."""

from __future__ import annotations

import contextlib
import tarfile
from pathlib import Path

import pytest

import snapfs
from snapfs.check import Report, check_pool, repair
from snapfs.descriptor import open_home
from snapfs.errors import DamagedError, DeviceMissingError
from snapfs.ownership import device_opener
from snapfs.rescue import open_damaged_pool
from snapfs.scrub import verify

from .harness import everything_is_proven, read_snapshot, read_volume

GOLDEN = Path(__file__).parent / "golden"


def unpacked(version: str, folder: Path) -> Path:
    """The golden pool of a version, in a folder."""
    with tarfile.open(GOLDEN / f"pool-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "pool"


def checked(path: Path) -> Report:
    """What the verifier says of a pool."""
    home = open_home(str(path))
    try:
        return check_pool(home, str(path), device_opener(home))
    finally:
        home.close()


@pytest.mark.parametrize("version", ["0.1.0"])
async def test_a_pool_of_an_earlier_version_opens(version: str, tmp_path: Path) -> None:
    """Made of: v = 'one ' * 3000; snapshot first; 'two ' at 4096; truncate to 9000; snapshot second of v; w removed."""
    path = unpacked(version, tmp_path)
    # The archive has no holes, so blocks of zeros lie where no map points; a repair gives them back.
    for is_repaired in (False, True):
        report = checked(path)
        assert not report.is_damaged and report.snapshot_count == 2, report.findings
        if not is_repaired:
            home = open_home(str(path))
            await repair(home, str(path), device_opener(home))
    assert report.is_clean, report.findings
    async with snapfs.open_pool(path) as pool:
        changed = bytearray(b"one " * 3000)
        changed[4096:4100] = b"two "
        assert await read_volume(pool, b"v") == changed[:9000]
        first, second = (pool.snapshots.get(one) for one in (b"first", b"second"))
        assert await read_snapshot(pool, first, b"v") == b"one " * 3000
        assert await read_snapshot(pool, first, b"w") == b"gone"
        assert await read_snapshot(pool, second, b"v") == changed[:9000]
        assert (first.note, second.volume_ids is None) == ("a note", False)
        await pool.volumes.create(b"new")


async def test_a_pool_of_0_2_0_opens(tmp_path: Path) -> None:
    """Made of: v = 'one ' * 3000; w cow, 'cow ' * 5000; snapshot first; 'two ' in both; clone c of first/v,
    'fork' in it; snapshot second of v; rollback of v to first; a schedule."""
    path = unpacked("0.2.0", tmp_path)
    assert not checked(path).is_damaged, checked(path).findings
    one, cow = b"one " * 3000, b"cow " * 5000
    two = one[:4096] + b"two " + one[4100:]
    async with snapfs.open_pool(path) as pool:
        assert await read_volume(pool, b"v") == one
        assert await read_volume(pool, b"w") == cow[:8192] + b"two " + cow[8196:]
        assert await read_volume(pool, b"c") == b"fork" + one[4:]
        first, second = (pool.snapshots.get(name) for name in (b"first", b"second"))
        undo = next(one for name, one in pool.snapshots.by_name.items() if name.endswith(b"-before-rollback"))
        assert await read_snapshot(pool, first, b"w") == cow
        assert await read_snapshot(pool, first, b"v") == one
        assert await read_snapshot(pool, second, b"v") == two == await read_snapshot(pool, undo, b"v")
        assert first.hold_tags == {"kept"}
        assert [one["keep"] for one in pool.scheduler.entries()] == ["7d,12m"]
        await pool.clones.rollback(b"second")
        assert await read_volume(pool, b"v") == two


async def test_a_pool_of_0_3_0_opens(tmp_path: Path) -> None:
    """As that of 0.2.0, and: rollback of w to first; a hook; all sealed."""
    path = unpacked("0.3.0", tmp_path)
    assert not checked(path).is_damaged, checked(path).findings
    async with snapfs.open_pool(path) as pool:
        first, second = (pool.snapshots.get(name) for name in (b"first", b"second"))
        assert await read_volume(pool, b"w") == b"cow " * 5000 == await read_snapshot(pool, first, b"w")
        assert await read_volume(pool, b"c") == b"fork" + (b"one " * 3000)[4:]
        assert first.root == "cd4e1356d14f8177abdf086be3f3d1756357b90ae31d783ade171fe57712fd8c"
        assert second.root == "713fbfb4560ffa8ae50e6691cdd3268c8883a7ec4ae640c2bdc17e5bae27ba3d"
        await everything_is_proven(pool)
        assert (await verify(pool, first)).unsealed == ["w"]
        (hook,) = pool.hooks.entries()
        assert (hook["name"], hook["time_limit_s"], hook["volumes"]) == ("app", 20, ("v",))


async def test_a_pool_of_0_8_0_opens(tmp_path: Path) -> None:
    """As that of 0.3.0, and: z, in every second block 'zero', then from 1 on in every third 'more', then from 2 on in
    every sixth 'last', with snapshots z0, z1, z2; 'live' in it. Maps of such copies are deflated."""
    path = unpacked("0.8.0", tmp_path)
    assert not checked(path).is_damaged, checked(path).findings
    async with snapfs.open_pool(path) as pool:
        assert pool.snapshots.get(b"second").root == "713fbfb4560ffa8ae50e6691cdd3268c8883a7ec4ae640c2bdc17e5bae27ba3d"
        contents = bytearray(898 * 4096 + 4)
        for number, text in enumerate((b"zero", b"more", b"last")):
            for block in range(number, 900, number * number + 2):
                contents[block * 4096 : block * 4096 + 4] = text
            assert await read_snapshot(pool, pool.snapshots.get(b"z%d" % number), b"z") == contents
        assert await read_volume(pool, b"z") == b"live" + contents[4:]
        await everything_is_proven(pool)


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "0.3.0", "0.8.0"])
async def test_what_is_left_of_a_pool_of_an_earlier_version_is_read_and_nothing_changed(
    version: str, tmp_path: Path
) -> None:
    path = unpacked(version, tmp_path)
    (path / "shards" / "1.sqlite").unlink()
    before = {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}
    async with open_damaged_pool(str(path)) as pool:
        assert len(pool.lost) == 1
        read = 0
        for snapshot in pool.snapshots.by_name.values():
            for name in (await pool.snapshots.members(snapshot)).by_name:
                with contextlib.suppress(DamagedError, DeviceMissingError):
                    await read_snapshot(pool, snapshot, name)
                    read += 1
        assert read
    assert {one: one.read_bytes() for one in path.rglob("*") if one.is_file()} == before


async def test_a_pool_of_an_earlier_version_whose_device_is_not_there_is_not_upgraded(tmp_path: Path) -> None:
    path = unpacked("0.1.0", tmp_path)
    before = {one.name: one.read_bytes() for one in path.iterdir() if one.is_file()}
    (path / "device").rename(path / "elsewhere")
    with pytest.raises(DeviceMissingError):
        async with snapfs.open_pool(path):
            pass
    assert {one.name: one.read_bytes() for one in path.iterdir() if one.is_file() and one.name in before} == before
