"""Reading what is left of a damaged pool."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import trio

from snapfs import database as database_module
from snapfs.backends import AbsentDevice, Device, DeviceFile, ReadOnlyDevice
from snapfs.check import check_pool
from snapfs.database import Database, read_copy
from snapfs.errors import DamagedError, InUseError, NoSpaceError, NotAPoolError, SnapfsError, TooNewError
from snapfs.formats import COPY_ON_WRITE
from snapfs.making import VolumeWish
from snapfs.manifest import manifest_of
from snapfs.pool import Pool
from snapfs.rescue import rescued_pool

from .damage import device_contents
from .harness import WHERE, Running, World, open_world, read_snapshot, read_volume

BLOCK = 4096
OBJECT = 4 << 20
OLD = random.Random(1).randbytes(2 * OBJECT)
NEW = random.Random(2).randbytes(BLOCK)


async def put(pool: Pool, name: bytes, offset: int, data: bytes) -> None:
    async with pool.volumes.opened(name) as volume:
        await volume.write(offset, data)


async def filled() -> World:
    """Two processors: a volume with an object on each, one on the first alone, and both in a snapshot."""
    world = World(processor_count=2, device_count=2)
    async with open_world(world) as pool:
        for name, length in ((b"long", 2 * OBJECT), (b"short", OBJECT)):
            await pool.volumes.create(name)
            await put(pool, name, 0, OLD[:length])
        await pool.snapshots.create(b"s")
        for name in (b"long", b"short"):
            await put(pool, name, 0, NEW)
    return world


def overwrite(device: Device, name: str, contents: bytes) -> None:
    file = device.create(name)
    file.write(contents, 0)
    file.close()


def spoil(device: Device, name: str, table: str) -> None:
    """Overwrite the root page of a table, or the index that holds one."""
    database = Database(device, name, name)
    (root,) = database.rows("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,))[0]
    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    file = device.open(name)
    file.write(b"\xff" * BLOCK, (root - 1) * BLOCK)
    file.close()


@contextlib.asynccontextmanager
async def rescued(world: World) -> AsyncIterator[Pool]:
    """What is left; nothing of the pool is other than before when it is closed."""
    before = {where: device_contents(device) for where, device in world.all_devices().items()}
    async with rescued_pool(world.home, WHERE, world.open_device, world.open_image) as pool:
        yield pool
    assert {where: device_contents(device) for where, device in world.all_devices().items()} == before


async def read_part(pool: Pool, name: bytes, offset: int, length: int) -> bytes:
    async with pool.volumes.opened(name) as volume:
        return bytes(await volume.read(offset, length))


@pytest.mark.parametrize("how", ["missing", "damaged", "empty", "old copy"])
async def test_what_other_processors_keep_is_read(how: str) -> None:
    world = await filled()
    name = "shards/1.sqlite"
    if how == "missing":
        world.home.remove(name)
    elif how == "damaged":
        spoil(world.home, name, "maps")
    elif how == "empty":
        overwrite(world.home, name, b"")
    else:
        before = world.home.read_file(name)
        async with open_world(world) as pool:
            await put(pool, b"long", OBJECT, NEW)
            await pool.snapshots.create(b"later")
        overwrite(world.home, name, before)
    with pytest.raises(DamagedError):
        Pool.open(world.home, WHERE, world.open_device)
    world.home.close()
    async with rescued(world) as pool:
        (words,) = pool.lost
        assert how in words and words.endswith("; what processor 1 keeps cannot be read")
        assert await read_volume(pool, b"short") == NEW + OLD[BLOCK:OBJECT]
        assert await read_snapshot(pool, pool.snapshots.get(b"s"), b"short") == OLD[:OBJECT]
        assert await read_part(pool, b"long", 0, OBJECT) == NEW + OLD[BLOCK:OBJECT]
        for _ in range(2):
            with pytest.raises(DamagedError, match=how):
                await read_part(pool, b"long", OBJECT, BLOCK)
            with pytest.raises(DamagedError, match=how):
                await read_snapshot(pool, pool.snapshots.get(b"s"), b"long")


async def test_a_lost_device_takes_what_lies_there_and_no_more() -> None:
    world = await filled()
    gone = world.devices.pop("1")
    async with rescued(world) as pool:
        (words,) = pool.lost
        assert "device 1 of the pool is not at 1" in words and words.endswith("; what lies there cannot be read")
        # The objects of a volume lie on the devices in turn.
        where = {
            (name, place): pool.placement.device_for(volume.volume_id, place // OBJECT, is_change=False)
            for name, volume in pool.volumes.by_name.items()
            for place in range(0, volume.size_bytes, OBJECT)
        }
        assert set(where.values()) == {0, 1}
        for (name, place), device_id in where.items():
            if device_id == 0:
                expected = (NEW + OLD[BLOCK:])[place : place + OBJECT]
                assert await read_part(pool, name, place, OBJECT) == expected
            else:
                with pytest.raises(OSError) as caught:
                    await read_part(pool, name, place, BLOCK)
                assert caught.value.errno == errno.ENODEV
    world.devices["1"] = gone
    world.check_clean()


async def test_the_catalog_needs_to_be_sound_where_names_are() -> None:
    world = await filled()
    spoil(world.home, "catalog.sqlite", "hooks")
    with pytest.raises(DamagedError):
        Pool.open(world.home, WHERE, world.open_device)
    world.home.close()
    async with rescued(world) as pool:
        assert not pool.lost
        assert await read_volume(pool, b"long") == NEW + OLD[BLOCK:]
    spoil_again = await filled()
    spoil(spoil_again.home, "catalog.sqlite", "volumes")
    with pytest.raises(DamagedError, match="the catalog is damaged"):
        async with rescued(spoil_again):
            pass
    spoil_again.home.remove("catalog.sqlite")
    with pytest.raises(DamagedError, match="the catalog is missing"):
        async with rescued(spoil_again):
            pass


async def test_the_pools_descriptor_is_not_needed() -> None:
    world = await filled()
    descriptor = world.home.read_file("pool.json")
    overwrite(world.home, "pool.json", b"{}")
    async with rescued(world) as pool:
        assert pool.lost and pool.descriptor.processor_count == 2
        assert await read_volume(pool, b"long") == NEW + OLD[BLOCK:]
    # What a later snapfs wrote is not guessed at.
    overwrite(world.home, "pool.json", json.dumps({**json.loads(descriptor), "format_version": 99}).encode())
    with pytest.raises(TooNewError):
        async with rescued(world):
            pass


async def test_a_pool_that_is_in_use_is_left_alone() -> None:
    world = await filled()
    async with open_world(world):
        with pytest.raises(InUseError):
            async with rescued_pool(world.home, WHERE, world.open_device, world.open_image):
                pass


async def test_copy_on_write_volumes_are_read_and_nothing_is_preserved() -> None:
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"c", 2 * OBJECT, COPY_ON_WRITE))
        await put(pool, b"c", 0, OLD)
        await pool.snapshots.create(b"s")
        await put(pool, b"c", 0, NEW)
        await pool.clones.clone(b"s", b"c", b"clone")
    world.home.remove("shards/1.sqlite")
    async with rescued(world) as pool:
        assert await read_part(pool, b"c", 0, OBJECT) == NEW + OLD[BLOCK:OBJECT]
        with pytest.raises(DamagedError):
            await read_part(pool, b"c", OBJECT, BLOCK)
        # To look into it would preserve what it looks at.
        with pytest.raises((SnapfsError, OSError)):
            await read_part(pool, b"clone", 0, BLOCK)


async def test_a_volume_whose_rollback_was_cut_off_stays_closed() -> None:
    world = World(processor_count=2)
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"c", OBJECT, COPY_ON_WRITE))
        await put(pool, b"c", 0, OLD[:OBJECT])
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, OLD[:BLOCK])
        await pool.snapshots.create(b"s")
    database = Database(world.home, "catalog.sqlite", "x")
    with database.transaction():
        database.execute("UPDATE traits SET restore_instant = 1")
    database.close()
    async with rescued(world) as pool:
        with pytest.raises(SnapfsError, match="could not be finished"):
            await read_part(pool, b"c", 0, BLOCK)
        assert await read_volume(pool, b"v") == OLD[:BLOCK]


async def test_devices_that_change_nothing() -> None:
    world = await filled()
    device = ReadOnlyDevice(world.devices["0"])
    before = device_contents(world.devices["0"])
    (name, *_) = [one for one in before if one.startswith("logs/")]
    file = device.open(name)
    buffer = bytearray(BLOCK)
    assert file.try_read_into(buffer, 0) == file.read_into(bytearray(BLOCK), 0) == BLOCK
    assert buffer == before[name][1][0]
    refused: list[Callable[[], object]] = [
        lambda: file.write(b"x", 0),
        lambda: file.write_new(b"x", 0),
        file.sync,
        lambda: file.punch(0, BLOCK),
        lambda: file.truncate(0),
        lambda: file.reserve(BLOCK),
        lambda: device.create("x"),
        lambda: device.remove(name),
        lambda: device.rename(name, "x"),
        lambda: device.sync_names(""),
        lambda: device.write_file("x", b""),
    ]
    absent = AbsentDevice()
    missing: list[Callable[[], object]] = [
        lambda: absent.open("x"),
        lambda: absent.create("x"),
        lambda: absent.remove("x"),
        lambda: absent.rename("x", "y"),
        lambda: absent.names(""),
        lambda: absent.sync_names(""),
        absent.space,
        lambda: absent.lock("x", "y"),
    ]
    for calls, code in ((refused, errno.EROFS), (missing, errno.ENODEV)):
        for call in calls:
            with pytest.raises(OSError) as caught:
                call()
            assert caught.value.errno == code
    file.close()
    absent.close()
    assert absent.local_path("x") is None and device.local_path("x") is None
    assert device_contents(world.devices["0"]) == before


def change(device: Device, name: str, *statements: str) -> None:
    """Change a database behind the pool's back."""
    database = Database(device, name, name)
    with database.transaction():
        for statement in statements:
            database.execute(statement)
    database.close()


@pytest.mark.parametrize("field, value", [("processor_count", 1), ("processor_count", 6), ("pool_id", "another")])
async def test_a_descriptor_that_is_not_the_catalogs_is_not_believed(field: str, value: object) -> None:
    world = await filled()
    descriptor = {**json.loads(world.home.read_file("pool.json")), field: value}
    overwrite(world.home, "pool.json", json.dumps(descriptor).encode())
    with pytest.raises(DamagedError):
        Pool.open(world.home, WHERE, world.open_device)
    world.home.close()
    async with rescued(world) as pool:
        assert pool.lost == ["memory/pool.json does not agree with the catalog, which is believed"]
        assert await read_volume(pool, b"long") == NEW + OLD[BLOCK:]


async def test_other_files_among_the_stores_are_no_matter() -> None:
    world = await filled()
    for name in ("0.sqlite.bak", "lost+found", ".nfs0001", "0.sqlite-journal", "copy of 1.sqlite"):
        world.home.create(f"shards/{name}").close()
    async with rescued(world) as pool:
        assert not pool.lost and await read_volume(pool, b"long") == NEW + OLD[BLOCK:]


@pytest.mark.parametrize("rows", ["DELETE FROM shards", "DELETE FROM shards WHERE processor_index = 1"])
async def test_how_many_processors_there_are_is_not_guessed(rows: str) -> None:
    world = await filled()
    change(world.home, "catalog.sqlite", rows)
    for _ in range(2):
        with pytest.raises(DamagedError, match="processors"):
            async with rescued(world):
                pass
        with pytest.raises((DamagedError, NotAPoolError)):
            Pool.open(world.home, WHERE, world.open_device)
        world.home.close()
        overwrite(world.home, "pool.json", b"")


@pytest.mark.parametrize(
    "statement, words",
    [
        ("DELETE FROM shards WHERE processor_index = 1", "other processors"),
        ("INSERT INTO shards VALUES (2, 0)", "other processors"),
        ("DELETE FROM meta WHERE key = 'clean'", "lacks its clean"),
        ("DELETE FROM meta WHERE key = 'next_instant'", "lacks its next_instant"),
    ],
)
async def test_the_verifier_finds_what_keeps_a_pool_from_opening(statement: str, words: str) -> None:
    world = await filled()
    change(world.home, "catalog.sqlite", statement)
    with pytest.raises(DamagedError):
        Pool.open(world.home, WHERE, world.open_device)
    world.home.close()
    report = check_pool(world.home, WHERE, world.open_device)
    assert any(one.severity == "damage" and words in one.what for one in report.findings)


async def test_a_database_that_cannot_be_read_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    world = await filled()
    opened = world.home.open

    def refuse(name: str) -> DeviceFile:
        if name == "shards/1.sqlite":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return opened(name)

    monkeypatch.setattr(world.home, "open", refuse)
    report = check_pool(world.home, WHERE, world.open_device)
    found = [one.what for one in report.findings if one.severity == "damage"]
    assert found == ["shard store 1 cannot be read: Input/output error"]


async def test_a_copys_folder_is_left_alone_once_it_is_gone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = await filled()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: itertools.repeat("x"))
    with read_copy(world.home, "catalog.sqlite", "the catalog") as database:
        assert os.listdir(tmp_path) == []
        # Somebody else has the name.
        (tmp_path / "snapfs-check-x").mkdir()
        assert database.rows("SELECT value FROM meta WHERE key = 'pool_id'")
    assert os.listdir(tmp_path) == ["snapfs-check-x"]


async def test_an_old_catalog_is_not_believed() -> None:
    world = await filled()
    before = world.home.read_file("catalog.sqlite")
    async with open_world(world) as pool:
        await put(pool, b"short", OBJECT, NEW)
        for name in (b"t", b"u"):
            await pool.snapshots.create(name)
            await put(pool, b"short", 0, NEW)
    overwrite(world.home, "catalog.sqlite", before)
    with pytest.raises(DamagedError, match="the catalog is an old copy"):
        async with rescued(world):
            pass


async def test_text_that_is_none_is_damage() -> None:
    world = await filled()
    change(world.home, "shards/1.sqlite", "UPDATE meta SET value = CAST(x'ff' AS TEXT) WHERE key = 'pool_id'")
    async with rescued(world) as pool:
        (words,) = pool.lost
        assert "processor 1" in words
        assert await read_volume(pool, b"short") == NEW + OLD[BLOCK:OBJECT]
    world = await filled()
    change(world.home, "catalog.sqlite", "UPDATE snapshots SET root = CAST(x'ff' AS TEXT)")
    with pytest.raises(DamagedError, match="the catalog is damaged"):
        Pool.open(world.home, WHERE, world.open_device)
    world.home.close()
    with pytest.raises(DamagedError, match="the catalog is damaged"):
        async with rescued(world):
            pass


@pytest.mark.parametrize("table", ["intermediates", "sqlite_autoindex_intermediates_1", "logs_by_volume", "portions"])
async def test_a_store_that_does_not_answer_takes_its_processor_and_not_the_pool(table: str) -> None:
    world = await filled()
    spoil(world.home, "shards/1.sqlite", table)
    async with rescued(world) as pool:
        (words,) = pool.lost
        assert "\n" not in words and words.endswith("; what processor 1 keeps cannot be read")
        assert await read_volume(pool, b"short") == NEW + OLD[BLOCK:OBJECT]


@pytest.mark.parametrize("table", ["sums", "contents", "freed", "candidates"])
async def test_damage_where_no_maps_are_leaves_its_processor_readable(table: str) -> None:
    world = await filled()
    spoil(world.home, "shards/1.sqlite", table)
    with pytest.raises(DamagedError):
        Pool.open(world.home, WHERE, world.open_device)
    world.home.close()
    async with rescued(world) as pool:
        assert not pool.lost
        # Nothing was sealed, so nothing has checksums that would be missing.
        assert await read_volume(pool, b"long") == NEW + OLD[BLOCK:]


async def test_no_room_for_copies_is_not_taken_for_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    world = await filled()
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(NoSpaceError, match="no place for copies of databases"):
        async with rescued(world):
            pass
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.undo()
    copied: list[str] = []

    def copy_one(device: Device, name: str, path: str) -> None:
        if name.startswith("shards/1"):
            with database_module._room_for_copies():
                raise full
        copied.append(name)
        original(device, name, path)

    original = database_module._copy_out
    monkeypatch.setattr(database_module, "_copy_out", copy_one)
    with pytest.raises(NoSpaceError):
        async with rescued(world):
            pass
    assert "shards/0.sqlite" in copied


async def test_devices_that_the_catalog_has_lost() -> None:
    world = await filled()
    change(world.home, "catalog.sqlite", "DELETE FROM devices WHERE device_id = 1")
    async with rescued(world) as pool:
        with pytest.raises(OSError) as caught:
            await read_volume(pool, b"long")
        assert caught.value.errno == errno.ENODEV
    running = Running(world)
    async with trio.open_nursery() as nursery:
        await running.start(nursery)
        with pytest.raises(DamagedError, match="which the pool does not have"):
            await read_volume(running.pool, b"long")
        await running.close()


async def test_the_manifest_of_a_snapshot_says_what_is_lost() -> None:
    world = await filled()
    world.home.remove("shards/1.sqlite")
    async with rescued(world) as pool:
        told = json.loads(await manifest_of(pool, pool.snapshots.get(b"s")))
        here, lost = told["intermediate_snapshots"]
        assert here["volumes"] and "lost" not in here
        assert lost["lost"] and lost["state"] is None


@pytest.mark.parametrize("is_there", [True, False])
async def test_images_that_changed_or_are_gone_are_told(is_there: bool) -> None:
    world = World(processor_count=2)
    world.make_image("/image", OLD[:OBJECT])
    async with open_world(world) as pool:
        await pool.maker.create(VolumeWish(b"v", None, COPY_ON_WRITE, "/image"))
        assert await read_volume(pool, b"v") == OLD[:OBJECT]
    if is_there:
        world.make_image("/image", OLD)
    else:
        world.outside.remove("image")
    async with rescued(world) as pool:
        assert (b"image-changed" if is_there else b"image-missing") in pool.events.contents
