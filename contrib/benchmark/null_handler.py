"""The ceiling: a pyfuse3 filesystem with one file whose handlers return constants, under pyfuse3's own loop.

Usage: null_handler.py MOUNT SIZE_BYTES [stock|fast]
"""

from __future__ import annotations

import errno
import os
import stat
import sys

import pyfuse3
import trio

FILE_INODE = 2
BUFFER = memoryview(bytes(1 << 20))


class NullOperations(pyfuse3.Operations):
    enable_writeback_cache = True

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.size_bytes = size_bytes

    def _entry(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        is_root = inode == pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o644
        entry.st_size = 0 if is_root else self.size_bytes
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        return entry

    async def lookup(self, parent_inode, name, ctx):
        if name == b"file":
            return self._entry(FILE_INODE)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def getattr(self, inode, ctx):
        return self._entry(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):
        return self._entry(inode)

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=1)

    async def read(self, fh, off, size):
        return BUFFER[:size]

    async def write(self, fh, off, buf):
        return len(buf)

    async def flush(self, fh):
        pass

    async def fsync(self, fh, datasync):
        pass

    async def release(self, fh):
        pass


def main() -> None:
    mount_point, size_bytes = sys.argv[1], int(sys.argv[2])
    if sys.argv[3:] == ["fast"]:
        from snapfs.fuse import loop

        loop.enable()
    pyfuse3.init(NullOperations(size_bytes), mount_point, {"default_permissions", "fsname=null"})
    try:
        trio.run(pyfuse3.main)
    finally:
        pyfuse3.close()


main()
