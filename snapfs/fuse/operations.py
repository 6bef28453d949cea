"""pyfuse3's requests, handed to the namespace and the open files. The only place that knows pyfuse3.

Errors become errno here: ours by their class, the system's as they are, anything else EIO and a
line in the log; an exception that went on would end the whole mount.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import mmap
import os
import sys
from bisect import bisect_right
from collections.abc import Callable, Collection, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import pyfuse3
from pyfuse3 import EntryAttributes, FileInfo, FUSEError, RequestContext, SetattrFields, StatvfsData

from ..errors import SnapfsError
from ..folder import MODE_MASK
from ..formats import AttributeChange
from ..geometry import VolumeId
from ..notresident import NotResidentError
from ..units import NAME_MAX_BYTES
from . import names
from .handles import ControlHandle, Handle, VolumeHandle
from .kernelnames import KernelNames
from .namespace import Caller, Namespace, Node

P = ParamSpec("P")
T = TypeVar("T")

_log = logging.getLogger("snapfs")
_STATFS_BLOCK = 4096
REQUEST_BYTES_MAX = 1 << 20


def _to_errno(error: BaseException) -> FUSEError:
    if isinstance(error, SnapfsError | OSError) and error.errno:
        if error.errno == errno.EIO:
            _log.error("%s", error)
        return FUSEError(error.errno)
    if isinstance(error, MemoryError):
        return FUSEError(errno.ENOMEM)
    _log.error("a request failed in an unforeseen way", exc_info=error)
    return FUSEError(errno.EIO)


def _translated(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """A handler whose errors reach the kernel as errno."""

    @functools.wraps(handler)
    async def run(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:  # noqa: BLE001 - see the module's text
            raise _to_errno(error) from None

    return run


def _caller(ctx: RequestContext) -> Caller:
    return Caller(ctx.pid, ctx.uid, ctx.gid)


class _Folder:
    """An open folder: the entries it had when the reading of it began, see :meth:`Namespace.listing`."""

    def __init__(self, inode: int) -> None:
        self.inode = inode
        self.entries: list[tuple[int, int]] | None = None


class Operations(pyfuse3.Operations):  # type: ignore[misc,unused-ignore]
    """The handlers. ``getxattr`` is left out: with it the kernel would ask before every write."""

    enable_writeback_cache = True
    enable_acl = False
    supports_dot_lookup = True

    def __init__(self, namespace: Namespace, kernel_names: KernelNames) -> None:
        super().__init__()
        self._namespace = namespace
        self._kernel_names = kernel_names
        self._handles: dict[int, Handle] = {}
        self._folders: dict[int, _Folder] = {}
        self._next_handle = 1
        # Reads and writes of volumes and snapshots so far.
        self.block_request_count = 0
        # pyfuse3 copies what a read returned before anything else runs, so one buffer serves all. It begins with a
        # page, as malloc's do not: from the page cache to 16 bytes behind a page's begin takes twice as long.
        self._buffer = memoryview(mmap.mmap(-1, REQUEST_BYTES_MAX))

    # -- the hot path ------------------------------------------------------------------------

    async def read(self, fh: int, off: int, size: int) -> bytes:
        """See pyfuse3."""
        handle = self._handles[fh]
        self.block_request_count += 1
        try:
            try:
                return handle.read_now(off, self._buffer[:size])  # type: ignore[return-value]
            except (NotResidentError, BlockingIOError):
                self.block_request_count -= handle.direct
                return await handle.read(off, size)  # type: ignore[return-value]
        except Exception as error:  # noqa: BLE001 - see the module's text
            raise _to_errno(error) from None

    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """See pyfuse3."""
        handle = self._handles[fh]
        self.block_request_count += 1
        try:
            try:
                return handle.write_now(off, buf)
            except NotResidentError:
                self.block_request_count -= handle.direct
                return await handle.write(off, buf)
        except Exception as error:  # noqa: BLE001 - see the module's text
            handle.note_failed_write()
            raise _to_errno(error) from None

    # -- files -------------------------------------------------------------------------------

    def _admit(self, handle: Handle) -> FileInfo:
        fh = self._next_handle
        self._next_handle += 1
        self._handles[fh] = handle
        return FileInfo(
            fh=fh,
            direct_io=handle.direct,
            keep_cache=not handle.direct,
            nonseekable=isinstance(handle, ControlHandle),
        )

    @_translated
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> FileInfo:
        """See pyfuse3."""
        handle = await self._namespace.open(inode, flags, _caller(ctx))
        self._refresh_no_blocks(handle)
        return self._admit(handle)

    @_translated
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """See pyfuse3."""
        caller = _caller(ctx)
        volume = await self._namespace.create(parent_inode, name, mode, caller)
        handle = await self._namespace.open(volume.file_id, flags & ~os.O_TRUNC, caller)
        return self._admit(handle), _attributes(self._namespace.volume_node(volume))

    @_translated
    async def mknod(self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext) -> EntryAttributes:
        """See pyfuse3."""
        if mode & 0o170000 != 0o100000:
            self._namespace.refuse_link(parent_inode)
        volume = await self._namespace.create(parent_inode, name, mode, _caller(ctx))
        return _attributes(self._namespace.volume_node(volume))

    @_translated
    async def flush(self, fh: int) -> None:
        """See pyfuse3."""
        handle = self._handles[fh]
        self._refresh_block_count(handle)
        handle.flush()

    @_translated
    async def fsync(self, fh: int, datasync: bool) -> None:
        """See pyfuse3."""
        handle = self._handles[fh]
        await handle.fsync(data_only=datasync)
        self._refresh_block_count(handle)

    def _refresh_no_blocks(self, handle: Handle) -> None:
        """A volume without blocks has a writer, or one less: it is shown otherwise by that."""
        if isinstance(handle, VolumeHandle) and handle.is_writer and not handle.volume.block_count:
            with contextlib.suppress(OSError):
                pyfuse3.invalidate_inode(handle.volume.file_id, attr_only=True)

    def _refresh_block_count(self, handle: Handle) -> None:
        """Have the kernel ask again what ``du`` shows. Of attributes only, so it waits for no page."""
        if isinstance(handle, VolumeHandle) and handle.has_new_block_count():
            with contextlib.suppress(OSError):
                pyfuse3.invalidate_inode(handle.volume.file_id, attr_only=True)

    @_translated
    async def release(self, fh: int) -> None:
        """See pyfuse3."""
        handle = self._handles.pop(fh)
        self._namespace.close(handle)
        self._refresh_no_blocks(handle)

    # -- names and attributes ----------------------------------------------------------------

    @_translated
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """See pyfuse3."""
        with self._folder_request(parent_inode):
            return _attributes(await self._namespace.lookup(parent_inode, name, _caller(ctx)))

    def _folder_request(self, *inodes: int) -> AbstractContextManager[None]:
        """Around whatever has the kernel lock these folders."""
        return self._kernel_names.request() if names.SNAPSHOTS in inodes else nullcontext()

    @_translated
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """See pyfuse3."""
        return _attributes(self._namespace.as_seen_by(_caller(ctx), await self._namespace.node(inode)))

    @_translated
    async def setattr(
        self, inode: int, attr: EntryAttributes, fields: SetattrFields, fh: int | None, ctx: RequestContext
    ) -> EntryAttributes:
        """See pyfuse3."""
        change = AttributeChange(
            mode=attr.st_mode & (MODE_MASK if inode == names.ROOT else 0o777) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            ctime_ns=attr.st_ctime_ns if fields.update_ctime else None,
        )
        size = attr.st_size if fields.update_size else None
        return _attributes(await self._namespace.change(inode, change, size, _caller(ctx)))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """See pyfuse3. Inode numbers are worked out, not counted, so there is nothing to forget."""

    @_translated
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """See pyfuse3."""
        await self._namespace.remove_file(parent_inode, name, _caller(ctx))

    @_translated
    async def mkdir(self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext) -> EntryAttributes:
        """See pyfuse3."""
        self._namespace.pool.hooks.refuse_inside(ctx.pid)
        with self._folder_request(parent_inode):
            return _attributes(await self._namespace.make_folder(parent_inode, name))

    @_translated
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """See pyfuse3."""
        self._namespace.pool.hooks.refuse_inside(ctx.pid)
        with self._folder_request(parent_inode):
            await self._namespace.remove_folder(parent_inode, name, _caller(ctx))

    @_translated
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """See pyfuse3."""
        if flags & ~(pyfuse3.RENAME_NOREPLACE | pyfuse3.RENAME_EXCHANGE):
            raise FUSEError(errno.EINVAL)
        if parent_inode_old == names.SNAPSHOTS:
            self._namespace.pool.hooks.refuse_inside(ctx.pid)
        with self._folder_request(parent_inode_old, parent_inode_new):
            await self._namespace.rename(
                parent_inode_old,
                name_old,
                parent_inode_new,
                name_new,
                replace=not flags & pyfuse3.RENAME_NOREPLACE,
                exchange=bool(flags & pyfuse3.RENAME_EXCHANGE),
            )

    @_translated
    async def symlink(self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext) -> EntryAttributes:
        """See pyfuse3."""
        self._namespace.refuse_link(parent_inode)
        raise FUSEError(errno.EPERM)

    @_translated
    async def link(self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext) -> EntryAttributes:
        """See pyfuse3."""
        self._namespace.refuse_link(new_parent_inode)
        raise FUSEError(errno.EPERM)

    # -- folders -----------------------------------------------------------------------------

    @_translated
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """See pyfuse3."""
        await self._namespace.node(inode)
        fh = self._next_handle
        self._next_handle += 1
        self._folders[fh] = _Folder(inode)
        return fh

    @_translated
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        """See pyfuse3."""
        folder = self._folders[fh]
        with self._folder_request(folder.inode):
            if folder.entries is None or start_id == 0:
                folder.entries = await self._namespace.listing(folder.inode)
            for place in range(bisect_right(folder.entries, (start_id, sys.maxsize)), len(folder.entries)):
                offset, inode = folder.entries[place]
                found = await self._namespace.entry(inode)
                if found is None:
                    continue
                name, node = found
                if not pyfuse3.readdir_reply(token, name, _attributes(node), offset):
                    return

    @_translated
    async def releasedir(self, fh: int) -> None:
        """See pyfuse3."""
        del self._folders[fh]

    @_translated
    async def fsyncdir(self, fh: int, datasync: bool) -> None:
        """See pyfuse3. Names are durable when the call that changed them returns."""

    @_translated
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """See pyfuse3."""
        space, file_count = await self._namespace.space()
        data = StatvfsData()
        data.f_bsize = data.f_frsize = _STATFS_BLOCK
        data.f_blocks = space.total_bytes // _STATFS_BLOCK
        data.f_bfree = data.f_bavail = space.free_bytes // _STATFS_BLOCK
        data.f_files = file_count + space.free_files
        data.f_ffree = data.f_favail = space.free_files
        data.f_namemax = NAME_MAX_BYTES
        return data

    def note_lost(self, file_ids: Collection[VolumeId], error: Exception) -> None:
        """What was written to these is lost, and the kernel has told the daemon, in place of those who wrote it."""
        for handle in self._handles.values():
            if isinstance(handle, VolumeHandle) and handle.is_writer and handle.volume.file_id in file_ids:
                handle.lost_by = error

    def close_all(self) -> None:
        """After the mount is gone: close what its users left open."""
        for handle in self._handles.values():
            self._namespace.close(handle)
        self._handles.clear()
        self._folders.clear()


def _attributes(node: Node) -> EntryAttributes:
    attributes = EntryAttributes()
    attributes.st_ino = node.inode
    attributes.st_mode = node.mode
    attributes.st_nlink = node.link_count
    attributes.st_uid = node.uid
    attributes.st_gid = node.gid
    attributes.st_size = node.size_bytes
    attributes.st_blksize = 4096
    attributes.st_blocks = node.block_count_512
    attributes.st_atime_ns = node.atime_ns
    attributes.st_mtime_ns = node.mtime_ns
    attributes.st_ctime_ns = node.ctime_ns
    attributes.attr_timeout = node.attr_timeout_s
    attributes.entry_timeout = node.entry_timeout_s
    return attributes
