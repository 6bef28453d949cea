"""A SQLite database on a device.

One connection, exclusive, in WAL mode with ``synchronous=FULL``: a commit that returned is durable.
On a device with local paths SQLite opens the file itself; on any other, such as one in memory that
can lose power, it goes through a VFS written over the device (https://sqlite.org/vfs.html).
A database is used by one thread at a time; its owner sees to that.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apsw

from .backends import Device, DeviceFile
from .errors import DamagedError, DatabaseFullError, NoSpaceError, SnapfsError, UnreadableError

SqlValue = None | int | float | bytes | str
Row = tuple[Any, ...]

_COPY_BYTES = 1 << 20

_vfs_numbers = itertools.count()


class translated:  # noqa: N801 - it is used like a function
    """Turns SQLite's errors into ours; ``what`` names the database.

    A class, for it is around each query: a generator takes four times as long.
    """

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and (ours := self._ours(error)) is not None:
            raise ours from error

    def _ours(self, error: BaseException) -> SnapfsError | None:
        what = self._what
        match error:
            case apsw.FullError():
                return DatabaseFullError(
                    f"the device that holds {what} is full", "Delete snapshots or free space on it, then try again"
                )
            case apsw.CorruptError() | apsw.NotADBError() | apsw.SQLError() | UnicodeDecodeError():
                # An SQLError is a table or a column that is not there; text that is none passes SQLite's own checks.
                return DamagedError(f"{what} is damaged: {error}", "Unmount and run snapfs check")
            case OverflowError():
                # It held the largest number there is, and one more was to be stored, or looked for.
                return DamagedError(f"{what} is damaged: a number in it is too large", "Unmount and run snapfs check")
            case apsw.Error():
                return UnreadableError(f"{what} cannot be read or written: {error}", "See the system's log")
        return None


class Database:
    """An open database. ``what`` names it in errors. ``tables``: those that must be sound, all (None) else."""

    def __init__(
        self,
        device: Device,
        name: str,
        what: str,
        *,
        create_schemas: Sequence[str] | None = None,
        tables: Sequence[str] | None = None,
    ) -> None:
        self.what = what
        self.is_settled = True
        self._vfs: _DeviceVFS | None = None
        flags = apsw.SQLITE_OPEN_READWRITE
        if create_schemas is not None:
            flags |= apsw.SQLITE_OPEN_CREATE
            device.create(name).close()
        else:
            # Looked at without SQLite, which takes an empty file for a new database and writes to it.
            file = device.open(name)
            try:
                is_empty = file.size() == 0
            finally:
                file.close()
            if is_empty:
                raise DamagedError(f"{what} is empty", "Restore it from a copy")
        with translated(what):
            path = device.local_path(name)
            if path is None:
                self._vfs = _DeviceVFS(device)
                self._connection = apsw.Connection(name, flags=flags, vfs=self._vfs.vfs_name)
            else:
                self._connection = apsw.Connection(path, flags=flags)
            try:
                # First of all: what it is led to is not to be changed. Then also what it reads beside it.
                self._check_place(device, name, path)
                self._prepare(create_schemas, tables)
                self._check_place(device, f"{name}-wal", path)
            except BaseException:
                self._connection.close(True)
                raise
        if create_schemas is not None:
            device.sync_names(name.rpartition("/")[0])

    def _prepare(self, create_schemas: Sequence[str] | None, tables: Sequence[str] | None) -> None:
        for pragma in (
            "locking_mode=EXCLUSIVE",
            "journal_mode=WAL",
            "synchronous=FULL",
            "temp_store=MEMORY",
            "cache_size=-1024",
            "trusted_schema=OFF",
        ):
            self._connection.execute(f"PRAGMA {pragma}").fetchall()
        if create_schemas is not None:
            with self._connection:
                for schema in create_schemas:
                    self._connection.execute(schema).fetchall()
                self._connection.execute(f"PRAGMA user_version={len(create_schemas)}").fetchall()
        else:
            for wanted in ("1",) if tables is None else self._there(tables):
                self._look_through(wanted)

    def _check_place(self, device: Device, name: str, path: str | None) -> None:
        """SQLite opens by path, which may lead to another one since the device was opened. Raises UnreadableError."""
        if path is None:
            return
        try:
            is_there = device.has_open(name)
        except FileNotFoundError:
            is_there = False
        if not is_there:
            raise UnreadableError(
                f"{self.what} was exchanged for another while it was opened", "See who may rename the pool's directory"
            )

    def _there(self, tables: Sequence[str]) -> list[str]:
        """Those that there are: the database may be of an earlier version."""
        known = self._connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'").fetchall()
        return [one for one in tables if (one,) in known]

    def _look_through(self, wanted: str) -> None:
        """Raises DamagedError when it is not sound: what a damaged page no longer tells would be taken for absent.

        ``wanted`` is a table, or 1: all, up to the first thing that is wrong. It takes 0.6 s for a GiB in the page
        cache. (https://sqlite.org/pragma.html#pragma_quick_check)
        """
        found = self._connection.execute(f"PRAGMA quick_check({wanted})").fetchall()
        if found != [("ok",)]:
            raise DamagedError(
                f"{self.what} is damaged: {found[0][0]}", "Restore it from a copy; snapfs check tells more"
            )

    def upgrade(self, schemas: Sequence[str]) -> None:
        """Bring a database of an earlier version up to the last of ``schemas``, all or nothing.

        Those of version 1 carried no number.
        """
        version = max(1, self.number("PRAGMA user_version"))
        if version >= len(schemas):
            return
        with self.transaction():
            for schema in schemas[version:]:
                self.execute(schema)
            self.execute(f"PRAGMA user_version={len(schemas)}")

    def rows(self, sql: str, bindings: Sequence[SqlValue] = ()) -> list[Row]:
        """All rows of a query."""
        with translated(self.what):
            return self._connection.execute(sql, bindings).fetchall()

    def row(self, sql: str, bindings: Sequence[SqlValue] = ()) -> Row | None:
        """The first row of a query, None if it has none."""
        with translated(self.what):
            found: Row | None = self._connection.execute(sql, bindings).fetchone()
            return found

    def number(self, sql: str, bindings: Sequence[SqlValue] = ()) -> int:
        """The one number that a query always has, a count, say. Raises DamagedError when it is none."""
        row = self.row(sql, bindings)
        if row is None or not isinstance(row[0], int):
            raise DamagedError(
                f"{self.what} is damaged: it holds no number where one must be", "Restore it from a copy"
            )
        return row[0]

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Database]:
        """All statements inside become durable together, or none does.

        After an error that is so once :attr:`is_settled`, which it nearly always is at once.
        """
        self.settle()
        with translated(self.what):
            self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield self
            self._commit()
        except BaseException:
            if self._connection.in_transaction:
                with contextlib.suppress(apsw.Error):
                    self._connection.execute("ROLLBACK")
            with contextlib.suppress(SnapfsError):
                self.settle()
            raise

    def _commit(self) -> None:
        try:
            with translated(self.what):
                self._connection.execute("COMMIT")
        except BaseException:
            self.is_settled = False
            raise

    def settle(self) -> None:
        """Make sure that a commit which failed is not found after a power cut.

        What it wrote to the write-ahead log may reach the medium although the write behind it, or the sync, failed.
        Another commit takes its place there; until that is durable nobody may act on the failure. Raises what
        a commit raises.
        """
        if self.is_settled:
            return
        with translated(self.what):
            # It is written whatever it was before.
            self._connection.execute("PRAGMA application_id=1").fetchall()
        self.is_settled = True

    def each(self, sql: str, rows: Iterable[Sequence[SqlValue]]) -> None:
        """Execute a statement once for each row of values."""
        with translated(self.what):
            self._connection.executemany(sql, rows)

    def execute(self, sql: str, bindings: Sequence[SqlValue] = ()) -> None:
        """Execute a statement that gives no rows."""
        self.rows(sql, bindings)

    def close(self) -> None:
        """Close it; the write-ahead log is folded in, or stays beside it when there is no room for that."""
        with translated(self.what):
            try:
                self._connection.close()
            except apsw.FullError:
                self._connection.close(True)
        if self._vfs is not None:
            self._vfs.unregister()
            self._vfs = None

    def abandon(self) -> None:
        """Let go of it without another write, after a failure or in place of a crash."""
        with contextlib.suppress(apsw.Error):
            self._connection.close(True)
        if self._vfs is not None:
            self._vfs.unregister()
            self._vfs = None


def _copy_out(device: Device, name: str, path: str) -> None:
    with contextlib.closing(device.open(name)) as file, contextlib.ExitStack() as stack:
        with _room_for_copies():
            copy = stack.enter_context(open(path, "wb", buffering=0))
        offset = 0
        buffer = bytearray(_COPY_BYTES)
        while count := file.read_into(buffer, offset):
            with _room_for_copies():
                rest = memoryview(buffer)[:count]
                while rest:
                    rest = rest[copy.write(rest) :]
            offset += count


@contextlib.contextmanager
def _room_for_copies() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NoSpaceError(
            f"there is no place for copies of databases: {error}",
            "Make room for all databases of the pool in TMPDIR (/tmp if it is not set), or set it to another directory",
        ) from error


@contextlib.contextmanager
def read_copy(device: Device, name: str, what: str, tables: Sequence[str] | None = None) -> Iterator[Database]:
    """The database as it stands, write-ahead log included, opened from a copy: the original is not touched.

    ``tables`` are those that must be sound, all (None) else.
    """
    with _room_for_copies():
        folder = tempfile.mkdtemp(prefix="snapfs-check-")
    try:
        from_device = [name]
        if os.path.basename(name) + "-wal" in device.names(os.path.dirname(name)):
            from_device.append(name + "-wal")
        for one in from_device:
            _copy_out(device, one, os.path.join(folder, os.path.basename(one)))
        from .backends import DirectoryDevice

        inside = DirectoryDevice(folder)
        try:
            database = Database(inside, os.path.basename(name), what, tables=tables)
        finally:
            inside.close()
    finally:
        # Open it stays; so nothing is left behind by a process that is killed. Another may have the name by the end.
        shutil.rmtree(folder, ignore_errors=True)
    try:
        yield database
    finally:
        database.abandon()


class _DeviceVFS(apsw.VFS):
    """SQLite's view of a device. Exclusive WAL needs neither locks nor shared memory."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.vfs_name = f"snapfs-device-{next(_vfs_numbers)}"
        super().__init__(self.vfs_name, base="")

    def xOpen(self, name: Any, flags: list[int]) -> _DeviceVFSFile:  # type: ignore[override]  # noqa: N802
        """Open or create a file."""
        filename = name.filename() if isinstance(name, apsw.URIFilename) else name
        filename = filename.removeprefix("/")
        flags[1] = flags[0]
        try:
            return _DeviceVFSFile(self.device, filename, self.device.open(filename), created=False)
        except FileNotFoundError:
            if not flags[0] & apsw.SQLITE_OPEN_CREATE:
                raise apsw.CantOpenError(filename) from None
            return _DeviceVFSFile(self.device, filename, self.device.create(filename), created=True)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: N802
        """Remove a file."""
        filename = filename.removeprefix("/")
        with contextlib.suppress(FileNotFoundError):
            self.device.remove(filename)
        if syncdir:
            self.device.sync_names(filename.rpartition("/")[0])

    def xAccess(self, pathname: str, flags: int) -> bool:  # noqa: N802
        """Whether a file is there."""
        folder, _, last = pathname.removeprefix("/").rpartition("/")
        return last in self.device.names(folder)

    def xFullPathname(self, name: str) -> str:  # noqa: N802
        """Names are absolute as they are."""
        return name


class _DeviceVFSFile:
    """A file of SQLite on a device."""

    def __init__(self, device: Device, name: str, file: DeviceFile, *, created: bool) -> None:
        self._device = device
        self._name = name
        self._file = file
        self._name_is_durable = not created

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        buffer = bytearray(amount)
        return bytes(buffer[: self._file.read_into(buffer, offset)])

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        with _as_sqlite_error():
            self._file.write(data, offset)

    def xTruncate(self, newsize: int) -> None:  # noqa: N802
        with _as_sqlite_error():
            self._file.truncate(newsize)

    def xSync(self, flags: int) -> None:  # noqa: N802
        with _as_sqlite_error():
            self._file.sync()
            if not self._name_is_durable:
                self._device.sync_names(self._name.rpartition("/")[0])
                self._name_is_durable = True

    def xFileSize(self) -> int:  # noqa: N802
        return self._file.size()

    def xClose(self) -> None:  # noqa: N802
        self._file.close()

    def xLock(self, level: int) -> None:  # noqa: N802
        """The pool's lock keeps others out."""

    def xUnlock(self, level: int) -> None:  # noqa: N802
        """See :meth:`xLock`."""

    def xCheckReservedLock(self) -> bool:  # noqa: N802
        return False

    def xSectorSize(self) -> int:  # noqa: N802
        return 4096

    def xDeviceCharacteristics(self) -> int:  # noqa: N802
        return 0

    def xFileControl(self, op: int, ptr: int) -> bool:  # noqa: N802
        return False


@contextlib.contextmanager
def _as_sqlite_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        code = apsw.FullError if error.errno == 28 else apsw.IOError
        raise code(str(error)) from error


__all__ = ["Database", "Row", "SnapfsError", "SqlValue", "read_copy", "translated"]
