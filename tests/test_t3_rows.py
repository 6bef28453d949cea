"""One cell of a database that is wrong, where SQLite finds nothing: it is told, and nothing is taken apart for it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import trio

from snapfs.backends import CrashPlan, Device, MemoryDevice
from snapfs.catalogaccess import CatalogAccess
from snapfs.check import check_pool
from snapfs.damage import DamagedBlock, DamageLedger
from snapfs.database import Database
from snapfs.errors import DamagedError, NoSpaceError, SnapfsError
from snapfs.formats import COPY_ON_WRITE, CatalogBatch
from snapfs.making import VolumeWish
from snapfs.pool import Pool
from snapfs.rescue import rescued_pool
from snapfs.volume import Volume

from .harness import WHERE, World, in_memory, open_until_power_is_lost, open_world, read_volume
from .test_t3_clones import BLOCK, OBJECT, put

CATALOG, SHARD = "catalog.sqlite", "shards/0.sqlite"


async def filled() -> World:
    """A pool with something of everything, on one processor."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await pool.maker.create(VolumeWish(b"w", 4 * BLOCK, COPY_ON_WRITE))
        for name in (b"v", b"w"):
            await put(pool, name, 0, b"1" * 4 * BLOCK)
        await pool.snapshots.create(b"s")
        for name in (b"v", b"w"):
            await put(pool, name, 0, b"2" * BLOCK)
        await pool.clones.clone(b"s", b"v", b"c")
        await put(pool, b"c", OBJECT, b"3" * BLOCK)
        await pool.snapshots.create(b"named", [b"v"])
        await put(pool, b"v", BLOCK, b"4" * BLOCK)
        await pool.volumes.rename(b"v", b"V")
        await pool.snapshots.create(b"t")
        await put(pool, b"V", 2 * BLOCK, b"5" * BLOCK)
        assert await pool.sealer.seal_all()
    world.check_clean()
    return world


def change(world: World, name: str, statement: str) -> None:
    database = Database(world.home, name, name)
    database.execute(statement)
    assert database.row("SELECT changes()") == (1,)
    database.close()


def findings(world: World) -> list[tuple[str, str]]:
    report = check_pool(world.home, WHERE, world.open_device, world.has_image)
    world.home.close()
    return [(one.severity, one.what) for one in report.findings]


V = "(SELECT volume_id FROM volumes WHERE name = X'56')"
C = "(SELECT volume_id FROM volumes WHERE name = X'63')"
W = "(SELECT volume_id FROM volumes WHERE name = X'77')"
L = "(SELECT min(log_id) FROM logs WHERE volume_id = 256 AND block_count > 0)"
WRONG = {
    "a log is called a source": (SHARD, f"UPDATE logs SET kind = 1 WHERE log_id = {L}", "and is not"),
    "a source is of no kind": (SHARD, "UPDATE logs SET kind = 256 WHERE kind = 1", "of a kind that there is not"),
    "nothing is counted": (SHARD, f"UPDATE logs SET block_count = 0 WHERE log_id = {L}", "0 are counted"),
    "a snapshot is of some": (
        CATALOG,
        "UPDATE snapshots SET named = 1 WHERE name = X'73'",
        "that has lost this volume",
    ),
    "a version is gone": (
        CATALOG,
        f"DELETE FROM versions WHERE volume_id = {V} AND instant = 1",
        "lost the attributes",
    ),
    "a version is twice": (
        CATALOG,
        f"UPDATE versions SET epoch = 1 WHERE volume_id = {V} AND instant = (SELECT max(instant) FROM versions)",
        "kept twice",
    ),
    "a volume is gone": (CATALOG, "DELETE FROM volumes WHERE name = X'56'", "the catalog knows no such volume"),
    "a volume has another number": (
        CATALOG,
        f"UPDATE volumes SET volume_id = 7 WHERE volume_id = {V}",
        "no such volume",
    ),
    "an instant is the last": (
        CATALOG,
        f"UPDATE versions SET instant = {(1 << 63) - 1} WHERE volume_id = {V} AND instant = 1",
        "no number",
    ),
    "an epoch is gone": (SHARD, "DELETE FROM meta WHERE key = 'epoch'", "lacks its epoch"),
    "a member is not known": (CATALOG, "UPDATE members SET volume_id = 255", "which is not known"),
    "descent has no end": (CATALOG, f"UPDATE traits SET origin_id = volume_id WHERE volume_id = {C}", "a clone of"),
    "a size is too large": (CATALOG, f"UPDATE volumes SET size_bytes = {1 << 62} WHERE name = X'56'", "its size is"),
    "a name has a slash": (CATALOG, "UPDATE snapshots SET name = X'612F62' WHERE name = X'73'", "has a slash"),
    "a rollback of what is redirected": (
        CATALOG,
        f"UPDATE traits SET restore_instant = 1 WHERE volume_id = {C}",
        "no snapshot holds what",
    ),
    "a rollback to nothing": (CATALOG, f"UPDATE traits SET restore_instant = 99 WHERE volume_id = {W}", "no snapshot"),
}


def log_names(world: World) -> set[str]:
    return {name for device in world.devices.values() for name in device.names("logs/0")}


@pytest.mark.parametrize("wrong", WRONG)
async def test_a_wrong_cell_is_damage_and_takes_nothing_apart(wrong: str) -> None:
    world = await filled()
    before = log_names(world)
    name, statement, words = WRONG[wrong]
    change(world, name, statement)
    with trio.fail_after(60):
        told = findings(world)
        assert any(severity == "damage" and words in what for severity, what in told), told
        with contextlib.suppress(DamagedError):
            pool = Pool.open(world.home, WHERE, world.open_device, "test", world.open_image)
            await pool.recover()
            await pool.reclaimer.reclaim_all()
            for volume in list(pool.volumes.by_name):
                if pool.volumes.get(volume).size_bytes < OBJECT * 2:
                    with contextlib.suppress(SnapfsError):
                        await read_volume(pool, volume)
            await pool.close()
        world.home.close()
    assert log_names(world) >= before


# -- copies of another time ----------------------------------------------------------------------


def copy_of(device: Device) -> MemoryDevice:
    return in_memory(device).crash(CrashPlan(1, 1.0, 0.0, newest=True))


async def world_of_two_times() -> tuple[World, World]:
    """One pool at two times, with a mount between."""
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
        await put(pool, b"v", 0, b"1" * BLOCK)
    early = World.found({where: copy_of(device) for where, device in world.all_devices().items()})
    async with open_world(world) as pool:
        await put(pool, b"v", 0, b"2" * BLOCK)
    return early, world


async def test_a_device_that_is_an_older_copy_is_refused() -> None:
    early, late = await world_of_two_times()
    late.devices = early.devices
    with pytest.raises(DamagedError, match="device 0 is an old copy"):
        Pool.open(late.home, WHERE, late.open_device, "test", late.open_image)
    late.home.close()
    async with rescued_pool(late.home, WHERE, late.open_device, late.open_image) as pool:
        (lost,) = pool.lost
        assert "device 0 is an old copy" in lost


async def test_rescue_tells_that_the_pools_directory_is_older_than_its_devices() -> None:
    early, late = await world_of_two_times()
    early.devices = late.devices
    with pytest.raises(DamagedError, match="directory is an old copy"):
        Pool.open(early.home, WHERE, early.open_device, "test", early.open_image)
    early.home.close()
    async with rescued_pool(early.home, WHERE, early.open_device, early.open_image) as pool:
        (lost,) = pool.lost
        assert "the pool's directory is an old copy" in lost and "another time" in lost


async def test_a_device_that_gets_the_number_of_another_may_be_told_less(monkeypatch: pytest.MonkeyPatch) -> None:
    """The change log volume that had it before was told more, and the new one's note finds no room."""
    world = World(processor_count=1)
    world.devices["a"], world.devices["b"] = MemoryDevice(), MemoryDevice()
    async with open_world(world) as pool:
        await pool.changelogs.create(b"one", ["a"], 1 << 20)
    async with open_world(world) as pool:
        await pool.changelogs.remove(b"one")

        def full(*arguments: object) -> None:
            raise NoSpaceError("full")

        monkeypatch.setattr(pool.changelogs, "_note_generation", full)
        await pool.changelogs.create(b"two", ["b"], 1 << 20)
        monkeypatch.setattr(pool, "_note_generation", lambda: no_notes())
    async with open_world(world) as pool:
        assert [one["name"] for one in pool.changelogs.entries()] == ["two"]


async def no_notes() -> dict[str, int]:
    return {}


async def test_no_room_to_note_what_a_device_was_told_is_no_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
    save = CatalogAccess.save
    refused: list[bool] = []

    async def no_room(access: CatalogAccess, volumes: list[Volume], make_batch: Callable[[], CatalogBatch]) -> None:
        if any(key.startswith("told_device") for key in make_batch().meta):
            refused.append(True)
            raise NoSpaceError("full")
        await save(access, volumes, make_batch)

    with monkeypatch.context() as patch:
        patch.setattr(CatalogAccess, "save", no_room)
        pool = Pool.open(world.home, WHERE, world.open_device, "test", world.open_image)
        await pool.recover()
        assert refused and set(pool.volumes.by_name) == {b"v"}
    await pool.close()
    world.home.close()


async def test_a_damaged_map_beside_an_empty_log_with_a_file_keeps_no_pool_from_opening() -> None:
    world = await filled()
    change(world, SHARD, f"UPDATE logs SET block_count = 0 WHERE log_id = {L}")
    change(world, SHARD, "UPDATE maps SET map = X'00' WHERE volume_id = 256 AND object_index = 0")
    before = log_names(world)
    pool = Pool.open(world.home, WHERE, world.open_device, "test", world.open_image)
    await pool.recover()
    assert log_names(world) >= before
    await pool.close()
    world.home.close()


async def test_rescue_leaves_out_what_has_no_line_of_descent_and_shows_the_rest() -> None:
    world = await filled()
    change(world, CATALOG, f"UPDATE traits SET origin_id = volume_id WHERE volume_id = {C}")
    async with rescued_pool(world.home, WHERE, world.open_device, world.open_image) as pool:
        assert set(pool.volumes.by_name) == {b"V", b"w"} and "which is left out" in "".join(pool.lost)
        assert (await read_volume(pool, b"V"))[::BLOCK] == b"2451"
        members = await pool.snapshots.members(pool.snapshots.get(b"t"))
        assert set(members.by_name) == {b"V", b"w"}


async def test_rescue_goes_on_where_it_is_not_known_of_which_time_a_device_is() -> None:
    _, late = await world_of_two_times()
    change(late, CATALOG, "UPDATE meta SET value = 'x' WHERE key = 'told_device_0'")
    async with rescued_pool(late.home, WHERE, late.open_device, late.open_image) as pool:
        (lost,) = pool.lost
        assert "not known of which time" in lost and (await read_volume(pool, b"v"))[:1] == b"2"


async def test_power_loss_between_telling_a_device_and_noting_it_is_no_matter() -> None:
    world = World(processor_count=1)
    async with open_world(world) as pool:
        await pool.volumes.create(b"v")
    for _ in range(3):
        async with open_until_power_is_lost(world):
            pass
    async with open_world(world) as pool:
        assert set(pool.volumes.by_name) == {b"v"}


# -- who has what is damaged ---------------------------------------------------------------------


def test_who_has_a_damaged_block_is_worked_out_anew_after_each_scrub() -> None:
    ledger = DamageLedger()
    block = DamagedBlock(0, 1, 2, 3)
    ledger.note(*block)
    assert ledger.tell(block, {"of": "v"}) and ledger.untold() == []
    ledger.replace([block], [block])
    # Until then it is told as it was; and it is news only when it is another.
    assert ledger.entries() == [{"of": "v"}] and ledger.untold() == [block]
    assert not ledger.tell(block, {"of": "v"}) and ledger.untold() == []
    ledger.replace([block], [block])
    assert ledger.tell(block, {"of": "V"}) and ledger.entries() == [{"of": "V"}]
