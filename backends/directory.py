"""A directory of a local filesystem as a device."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import secrets
import stat
import threading
from collections.abc import Iterable

from .base import ANYBODY, Buffer, Device, DeviceFile, LockHolder, Space

# ext4 takes page cache folios as large as the write, and a later write of 4 KiB walks every block
# of its folio: after 1 MiB writes 22,000 of them a second, after 128 KiB writes 47,000 (Linux 6.18).
_NEW_WRITE_BYTES_MAX = 128 << 10
_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_SYNC_FILE_RANGE_WRITE = 0x02
_PROBE_BYTES = 4096
_O_FILE = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
_O_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_libc.sync_file_range.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _libc.fallocate(fd, mode, offset, length) != 0:
        code = ctypes.get_errno()
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))


class DirectoryFile(DeviceFile):
    """An open regular file. ``fd`` is its descriptor."""

    __slots__ = ("_nowait", "fd")

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._nowait = os.RWF_NOWAIT

    def read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """See :meth:`DeviceFile.read_into`."""
        count = os.preadv(self.fd, (buffer,), offset)
        if count in (0, len(buffer)):
            return count
        view = memoryview(buffer)
        while count < len(view):
            more = os.preadv(self.fd, (view[count:],), offset + count)
            if more == 0:
                break
            count += more
        return count

    def try_read_into(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Read what the page cache holds; see :meth:`DeviceFile.try_read_into`."""
        try:
            count = os.preadv(self.fd, (buffer,), offset, self._nowait)
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            # A filesystem without it (older tmpfs, say): read at once from now on.
            self._nowait = 0
            return self.read_into(buffer, offset)
        if count == len(buffer):
            return count
        # Short: the rest is not cached, or lies behind the end of the file.
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def write(self, data: Buffer, offset: int) -> None:
        """See :meth:`DeviceFile.write`."""
        count = os.pwrite(self.fd, data, offset)
        if count == len(data):
            return
        view = memoryview(data)
        while count < len(view):
            more = os.pwrite(self.fd, view[count:], offset + count)
            if more == 0:
                raise OSError(errno.ENOSPC, "the device took no more bytes")
            count += more

    def write_new(self, data: Buffer, offset: int) -> None:
        """See :meth:`DeviceFile.write_new`; in pieces, so that later small writes are fast."""
        if len(data) <= _NEW_WRITE_BYTES_MAX:
            self.write(data, offset)
            return
        view = memoryview(data)
        for start in range(0, len(view), _NEW_WRITE_BYTES_MAX):
            self.write(view[start : start + _NEW_WRITE_BYTES_MAX], offset + start)

    def begin_writeback(self) -> None:
        """See :meth:`DeviceFile.begin_writeback`. What fails is kept for the next sync (sync_file_range(2))."""
        if _libc.sync_file_range(self.fd, 0, 0, _SYNC_FILE_RANGE_WRITE) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def sync(self) -> None:
        """See :meth:`DeviceFile.sync`."""
        os.fdatasync(self.fd)

    def punch(self, offset: int, length: int) -> None:
        """See :meth:`DeviceFile.punch`. Where the filesystem has no holes to punch, zeros are written."""
        try:
            _fallocate(self.fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            end = min(offset + length, self.size())
            while offset < end:
                step = min(end - offset, 1 << 20)
                self.write(bytes(step), offset)
                offset += step

    def truncate(self, size_bytes: int) -> None:
        """See :meth:`DeviceFile.truncate`."""
        os.ftruncate(self.fd, size_bytes)

    def size(self) -> int:
        """See :meth:`DeviceFile.size`."""
        return os.fstat(self.fd).st_size

    def allocated(self) -> int:
        """See :meth:`DeviceFile.allocated`."""
        return os.fstat(self.fd).st_blocks * 512

    def reserve(self, length: int) -> None:
        """See :meth:`DeviceFile.reserve`."""
        _fallocate(self.fd, 0, 0, length)

    def data_extents(self) -> list[tuple[int, int]]:
        """See :meth:`DeviceFile.data_extents`; by SEEK_DATA and SEEK_HOLE."""
        extents: list[tuple[int, int]] = []
        position = 0
        while True:
            try:
                start = os.lseek(self.fd, position, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return extents
                raise
            position = os.lseek(self.fd, start, os.SEEK_HOLE)
            extents.append((start, position))

    def forget_cached(self, offset: int, length: int) -> None:
        """See :meth:`DeviceFile.forget_cached`."""
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """See :meth:`DeviceFile.close`."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)


class LocalImage(DirectoryFile):
    """A raw image or a block device, by its path."""

    __slots__ = ("_is_block_device",)

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self._is_block_device = stat.S_ISBLK(os.fstat(fd).st_mode)

    def size(self) -> int:
        """See :meth:`DeviceFile.size`."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def allocated(self) -> int:
        """See :meth:`DeviceFile.allocated`."""
        return self.size() if self._is_block_device else super().allocated()

    def truncate(self, size_bytes: int) -> None:
        """See :meth:`DeviceFile.truncate`. Raises OSError with ENOSPC behind the end of a block device."""
        if not self._is_block_device:
            super().truncate(size_bytes)
        elif size_bytes > self.size():
            raise OSError(errno.ENOSPC, "a block device cannot grow")

    def data_extents(self) -> list[tuple[int, int]]:
        """See :meth:`DeviceFile.data_extents`; a block device is taken for full."""
        return [(0, self.size())] if self._is_block_device else super().data_extents()


def open_local_image(path: str, writable: bool) -> LocalImage:
    """Open a raw image or a block device that lies anywhere on the host, by a path without symbolic links.

    Raises OSError, ELOOP when there is a link in it: somebody may have put it there since, to have another file opened.
    """
    # Only looked at: to open a tape drive or a watchdog does something.
    found_fd = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        found = os.fstat(found_fd)
        if stat.S_ISLNK(found.st_mode):
            raise OSError(errno.ELOOP, "it is a symbolic link")
        if not (stat.S_ISREG(found.st_mode) or stat.S_ISBLK(found.st_mode)):
            raise OSError(errno.EINVAL, "it is neither a file nor a block device")
        try:
            if os.readlink(f"/proc/self/fd/{found_fd}") != path:
                raise OSError(errno.ELOOP, "there is a symbolic link in its path")
            fd = os.open(f"/proc/self/fd/{found_fd}", flags)
        except FileNotFoundError:
            # Without proc mounted only a link in the last place is noticed.
            fd = os.open(path, flags | os.O_NOFOLLOW)
    finally:
        os.close(found_fd)
    try:
        if not os.path.samestat(os.fstat(fd), found):
            raise OSError(errno.ELOOP, "it was exchanged for another while it was opened")
        image = LocalImage(fd)
        if stat.S_ISBLK(os.fstat(fd).st_mode) and not image.size():
            # A loop device that was detached is there, without a size; its zeros are nobody's.
            raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))
        return image
    except BaseException:
        os.close(fd)
        raise


class _Probe:
    """A file without a name below a directory, to see whether what the directory lies on answers.

    Its first block is written to, which takes the page cache alone if all is well, and waits for a filesystem that is
    frozen or whose journal is stuck; its second is read past the page cache (open(2), O_TMPFILE and O_DIRECT). Where
    there are no such files the filesystem is asked for its room: one on another host has to ask there.
    """

    def __init__(self, folder_fd: int) -> None:
        self._folder_fd = folder_fd
        self._fds: tuple[int, int] | None = None
        self._buffer = mmap.mmap(-1, _PROBE_BYTES)
        self._lock = threading.Lock()
        self._is_closed = False

    def ask(self) -> None:
        """Blocks until there is an answer. Raises OSError."""
        try:
            with self._lock:
                self._ask()
        finally:
            # Only now: whoever closed it just before the lock was free has left this to us.
            if self._is_closed:
                self.close()

    def _ask(self) -> None:
        if self._is_closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._fds is None:
            try:
                self._fds = self._opened()
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                    raise
                os.fstatvfs(self._folder_fd)
                return
        cached, direct = self._fds
        os.pwrite(cached, b"\0", 0)
        os.preadv(direct, (self._buffer,), _PROBE_BYTES)

    def _opened(self) -> tuple[int, int]:
        cached = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._folder_fd)
        try:
            for offset in (0, _PROBE_BYTES):
                # One by one: as one folio of the page cache the second could not be read without the first written.
                os.pwrite(cached, bytes(_PROBE_BYTES), offset)
            try:
                direct = os.open(f"/proc/self/fd/{cached}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            except OSError:
                # A filesystem in memory, say.
                direct = os.dup(cached)
        except BaseException:
            os.close(cached)
            raise
        return cached, direct

    def close(self) -> None:
        """Close the file. While it is used it stays, so that nobody else's is used in its place."""
        self._is_closed = True
        if self._lock.acquire(blocking=False):
            try:
                self._let_go()
            finally:
                self._lock.release()

    def _let_go(self) -> None:
        fds, self._fds = self._fds, None
        for fd in fds or ():
            os.close(fd)


def _opened(name: str, flags: int, folder_fd: int) -> int:
    """An open file, of which reads are not noted: that would be one write more for a device that may hang."""
    try:
        return os.open(name, flags | os.O_NOATIME, dir_fd=folder_fd)
    except PermissionError:
        # Somebody else's file, in a pool that is only read.
        return os.open(name, flags, dir_fd=folder_fd)


class DirectoryDevice(Device):
    """Files below one directory.

    The directory must exist. It is held open, and everything is reached through descriptors
    without following symbolic links, so nothing planted inside can lead out of it. One that is not
    ``writable`` may lie on a filesystem that is not; its files are open for reading alone.
    """

    def __init__(self, path: str | os.PathLike[str], *, writable: bool = True) -> None:
        self.path = os.path.abspath(os.fspath(path))
        self._writable = writable
        self._folders: dict[str, int] = {"": os.open(self.path, _O_FOLDER & ~os.O_NOFOLLOW)}
        self._lock_fd = -1
        # What is only read is not written to in order to see whether it answers.
        self.may_hang = writable
        self._probe = _Probe(self._folders[""])

    def probe(self) -> None:
        """See :meth:`Device.probe`."""
        self._probe.ask()

    def _folder(self, folder: str, *, create: bool = False) -> int:
        known = self._folders.get(folder)
        if known is not None:
            return known
        if not folder:
            raise OSError(errno.EBADF, "the device is closed", self.path)
        outer, _, last = folder.rpartition("/")
        outer_fd = self._folder(outer, create=create)
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(last, 0o700, dir_fd=outer_fd)
        fd = os.open(last, _O_FOLDER, dir_fd=outer_fd)
        self._folders[folder] = fd
        return fd

    def open(self, name: str) -> DirectoryFile:
        """See :meth:`Device.open`."""
        folder, _, last = name.rpartition("/")
        flags = _O_FILE if self._writable else _O_FILE & ~os.O_RDWR
        # A named pipe in a file's place would be waited for.
        fd = _opened(last, flags | os.O_NONBLOCK, self._folder(folder))
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "it is no regular file", name)
        return DirectoryFile(fd)

    def create(self, name: str) -> DirectoryFile:
        """See :meth:`Device.create`. What is there goes: others may have put it there, and have it open."""
        folder, _, last = name.rpartition("/")
        folder_fd = self._folder(folder, create=True)
        flags = _O_FILE | os.O_NOATIME | os.O_CREAT | os.O_EXCL
        try:
            fd = os.open(last, flags, 0o600, dir_fd=folder_fd)
        except FileExistsError:
            os.unlink(last, dir_fd=folder_fd)
            fd = os.open(last, flags, 0o600, dir_fd=folder_fd)
        return DirectoryFile(fd)

    def remove(self, name: str) -> None:
        """See :meth:`Device.remove`."""
        folder, _, last = name.rpartition("/")
        os.unlink(last, dir_fd=self._folder(folder))

    def rename(self, old: str, new: str) -> None:
        """See :meth:`Device.rename`."""
        old_folder, _, old_last = old.rpartition("/")
        new_folder, _, new_last = new.rpartition("/")
        os.rename(
            old_last,
            new_last,
            src_dir_fd=self._folder(old_folder),
            dst_dir_fd=self._folder(new_folder, create=True),
        )

    def names(self, folder: str) -> list[str]:
        """See :meth:`Device.names`."""
        try:
            folder_fd = self._folder(folder)
        except FileNotFoundError:
            return []
        with os.scandir(folder_fd) as entries:
            return [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]

    def sync_names(self, folder: str) -> None:
        """See :meth:`Device.sync_names`."""
        os.fsync(self._folder(folder, create=True))
        if folder:
            os.fsync(self._folder(folder.rpartition("/")[0]))

    def space(self) -> Space:
        """See :meth:`Device.space`."""
        try:
            found = os.fstatvfs(self._folders[""])
        except KeyError:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from None
        return Space(
            # Without what is kept for root, which nobody else has or can use up: as df(1) counts what is used.
            total_bytes=(found.f_blocks - (found.f_bfree - found.f_bavail)) * found.f_frsize,
            free_bytes=found.f_bavail * found.f_frsize,
            total_files=found.f_files,
            free_files=found.f_favail,
        )

    def lock(self, name: str, holder: str) -> None:
        """See :meth:`Device.lock`; flock(2) on the directory and on a file, never removed, that tells of the holder.

        One that is not writable makes no such file, and tells nobody who holds it.
        """
        flags = (_O_FILE | os.O_CREAT if self._writable else _O_FILE & ~os.O_RDWR) | os.O_NONBLOCK
        # NFS locks a file to be written for those alone who may write to it.
        kind = fcntl.LOCK_EX if self._writable else fcntl.LOCK_SH
        with contextlib.ExitStack() as on_failure:
            fd = -1
            with contextlib.nullcontext() if self._writable else contextlib.suppress(FileNotFoundError):
                fd = os.open(name, flags, 0o600, dir_fd=self._folders[""])
                on_failure.callback(os.close, fd)
            try:
                self._lock_folder()
                if fd >= 0:
                    fcntl.flock(fd, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                known = os.pread(fd, 4096, 0) if fd >= 0 else b""
                raise LockHolder(known.decode("utf-8", "replace")) from None
            if self._writable:
                # On a full device nobody is told who holds it; it is held all the same.
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, 0)
                    os.pwrite(fd, holder.encode(), 0)
            on_failure.pop_all()
        self._lock_fd = fd

    def claim(self) -> None:
        """See :meth:`Device.claim`; flock(2) on the directory."""
        try:
            self._lock_folder()
        except BlockingIOError:
            raise LockHolder("") from None

    def _lock_folder(self) -> None:
        """Keep those out who find no file to lock. Not every filesystem has locks for directories."""
        try:
            fcntl.flock(self._folders[""], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            return

    def foreign_uid(self, names: Iterable[str]) -> int | None:
        """See :meth:`Device.foreign_uid`; of what is open, whatever its path leads to by now."""
        found = [os.fstat(self._folders[""])]
        for name in names:
            folder, _, last = name.rpartition("/")
            with contextlib.suppress(FileNotFoundError):
                found.append(os.stat(last, dir_fd=self._folder(folder), follow_symlinks=False))
        for one in found:
            if one.st_uid not in (0, os.geteuid()) and one.st_uid != self._uid_of_new():
                return one.st_uid
        is_open = any(one.st_mode & (stat.S_IWGRP | stat.S_IWOTH) for one in found)
        return ANYBODY if is_open else None

    def _uid_of_new(self) -> int | None:
        """Whose a new file would be: of root on another host (NFS, root_squash) some other user's. None: not known."""
        name = ""
        try:
            try:
                fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=self._folders[""])
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                    raise
                # NFS has no nameless files.
                name = f".snapfs-{secrets.token_hex(8)}"
                fd = os.open(name, _O_FILE | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self._folders[""])
        except OSError:
            return None
        try:
            return os.fstat(fd).st_uid
        finally:
            os.close(fd)
            if name:
                os.unlink(name, dir_fd=self._folders[""])

    def make_private(self) -> None:
        """See :meth:`Device.make_private`. One that is only read stays as it is."""
        if not self._writable:
            return
        found = os.fstat(self._folders[""])
        if found.st_uid != os.geteuid() and found.st_uid != self._uid_of_new():
            raise PermissionError(errno.EPERM, f"it belongs to another user, {found.st_uid}", self.path)
        if found.st_mode & 0o077:
            os.fchmod(self._folders[""], 0o700)

    def has_open(self, name: str) -> bool:
        """See :meth:`Device.has_open`; by /proc/self/fd."""
        folder, _, last = name.rpartition("/")
        wanted = os.stat(last, dir_fd=self._folder(folder), follow_symlinks=False)
        try:
            numbers = os.listdir("/proc/self/fd")
        except OSError:
            return True
        for number in numbers:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(int(number)), wanted):
                    return True
        return False

    def local_path(self, name: str) -> str:
        """See :meth:`Device.local_path`."""
        return os.path.join(self.path, name)

    def close(self) -> None:
        """See :meth:`Device.close`."""
        self._probe.close()
        if self._lock_fd >= 0:
            fd, self._lock_fd = self._lock_fd, -1
            if self._writable:
                with contextlib.suppress(OSError):
                    os.ftruncate(fd, 0)
            os.close(fd)
        for fd in self._folders.values():
            os.close(fd)
        self._folders.clear()
