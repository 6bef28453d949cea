"""Makes the golden pool of the version that is installed, in a folder that is not there yet."""

from __future__ import annotations

import os
import sys
import tarfile

import trio

import snapfs
from snapfs.backends import DirectoryDevice
from snapfs.pool import create_pool


async def make(folder: str) -> None:
    os.makedirs(os.path.join(folder, "pool", "device"))
    home = DirectoryDevice(os.path.join(folder, "pool"))
    device = DirectoryDevice(os.path.join(folder, "pool", "device"))
    create_pool(home, {"": device}, 2)
    home.close()
    device.close()
    async with snapfs.open_pool(os.path.join(folder, "pool")) as pool:
        for name, data in ((b"v", b"one " * 3000), (b"w", b"gone")):
            await pool.volumes.create(name)
            async with pool.volumes.opened(name) as volume:
                await volume.write(0, data)
        await pool.snapshots.create(b"first", note="a note")
        async with pool.volumes.opened(b"v") as volume:
            await volume.write(4096, b"two ")
            await pool.volumes.truncate(volume, 9000)
        await pool.snapshots.create(b"second", [b"v"])
        await pool.volumes.remove(b"w")
        await pool.reclaimer.reclaim_all()
    with tarfile.open(os.path.join(folder, f"pool-{snapfs.__version__}.tar.gz"), "w:gz") as archive:
        archive.add(
            os.path.join(folder, "pool"), "pool", filter=lambda one: None if one.name == "pool/reserve" else one
        )


if __name__ == "__main__":
    trio.run(make, sys.argv[1])
