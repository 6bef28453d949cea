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
from pyfuse3 import EntryAttributes, FileInfo, RequestContext, SetattrFields

FILE_INODE = 2
BUFFER = memoryview(bytes(1 << 20))


class NullOperations(pyfuse3.Operations):
    enable_writeback_cache = True

    def __init__(self, size_bytes: int) -> None:
        super().__init__()
        self.size_bytes = size_bytes

    def _entry(self, inode: int) -> EntryAttributes:
        entry = EntryAttributes()
        entry.st_ino = inode
        is_root = inode == pyfuse3.ROOT_INODE
        entry.st_mode = stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o644
        entry.st_size = 0 if is_root else self.size_bytes
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        return entry

    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        if name == b"file":
            return self._entry(FILE_INODE)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        return self._entry(inode)

    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        return self._entry(inode)

    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        return FileInfo(fh=1)

    async def read(self, fh: int, off: int, size: int) -> bytes:
        return BUFFER[:size]  # type: ignore[return-value]

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        return len(buf)

    async def flush(self, fh: int) -> None:
        pass

    async def fsync(self, fh: int, datasync: bool) -> None:
        pass

    async def release(self, fh: int) -> None:
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
