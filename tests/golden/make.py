"""Makes the golden pool of the version that is installed, in a folder that is not there yet."""

from __future__ import annotations

import os
import sys
import tarfile

import trio

import snapfs
from snapfs.backends import DirectoryDevice
from snapfs.formats import COPY_ON_WRITE
from snapfs.hook import make_hook
from snapfs.making import VolumeWish
from snapfs.pool import Pool, create_pool
from snapfs.schedule import make_schedule


async def write(pool: Pool, name: bytes, offset: int, data: bytes) -> None:
    async with pool.volumes.opened(name) as volume:
        await volume.write(offset, data)


async def make(folder: str) -> None:
    os.makedirs(os.path.join(folder, "pool", "device"))
    home = DirectoryDevice(os.path.join(folder, "pool"))
    device = DirectoryDevice(os.path.join(folder, "pool", "device"))
    create_pool(home, {"": device}, 2)
    home.close()
    device.close()
    async with snapfs.open_pool(os.path.join(folder, "pool")) as pool:
        await pool.volumes.create(b"v")
        await write(pool, b"v", 0, b"one " * 3000)
        await pool.maker.create(VolumeWish(b"w", 20000, COPY_ON_WRITE))
        await write(pool, b"w", 0, b"cow " * 5000)
        await pool.snapshots.create(b"first", note="a note", hold_tags=["kept"])
        await write(pool, b"v", 4096, b"two ")
        await write(pool, b"w", 8192, b"two ")
        await pool.clones.clone(b"first", b"v", b"c")
        await write(pool, b"c", 0, b"fork")
        await pool.snapshots.create(b"second", [b"v"])
        await pool.clones.rollback(b"first", [b"v"])
        await pool.clones.rollback(b"first", [b"w"])
        await pool.volumes.create(b"z")
        # Blocks of three change logs by turns: its map is long, and kept deflated.
        for number, text in enumerate((b"zero", b"more", b"last")):
            for block in range(number, 900, number * number + 2):
                await write(pool, b"z", block * 4096, text)
            await pool.snapshots.create(b"z%d" % number, [b"z"])
        await write(pool, b"z", 0, b"live")
        await pool.sync()
        await pool.scheduler.add(make_schedule("daily", "1d", "03:30", keep="7d,12m"))
        await pool.hooks.add(make_hook("app", "/bin/true before", "/bin/true after", "20s", ["v"], shell=False))
        await pool.sealer.seal_all()
    with tarfile.open(os.path.join(folder, f"pool-{snapfs.__version__}.tar.gz"), "w:gz") as archive:
        archive.add(
            os.path.join(folder, "pool"), "pool", filter=lambda one: None if one.name == "pool/reserve" else one
        )


if __name__ == "__main__":
    trio.run(make, sys.argv[1])
