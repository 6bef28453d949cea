"""The tree that users see: names, inodes and attributes over a pool. Knows nothing of pyfuse3.

::

    MOUNT/VOLUME                          MOUNT/.snapshots/NAME/VOLUME
    MOUNT/.snapfs/control                 MOUNT/.snapshots/NAME/.manifest.json
    MOUNT/.snapfs/status.json  events     MOUNT/.snapfs/processors/N.json

Errors are :class:`SnapfsError`; :class:`NoEntryError` for a name that is not there.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import time
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import NamedTuple

from ..backends import Space
from ..counting import stands_on_cow
from ..errors import (
    BadNameError,
    BusyVolumeError,
    NameTooLongError,
    NotFoundError,
    NotPermittedError,
    ReadOnlyError,
    ReservedNameError,
    SnapfsError,
    StaleVolumeError,
)
from ..formats import AttributeChange, Attributes
from ..geometry import BLOCK_SIZE, VolumeId
from ..pool import Pool, space_in
from ..snapshot import Snapshot
from ..status import pool_status, processor_status
from ..units import MANIFEST_NAME, NAME_MAX_BYTES, parse_moment, show_name
from ..volume import Volume
from . import names
from .command import CommandContext, ForgetPages, ResizeFile
from .control import ControlSession
from .handles import ControlHandle, EventsHandle, Handle, SnapshotHandle, TextHandle, VolumeHandle
from .manifests import Manifests

# Long: once it is over, the kernel asks before every write, until one answer arrives with no write
# in flight. The count of blocks, which it cannot know, is refreshed at fsync and close instead.
VOLUME_ATTR_TIMEOUT_S = 60.0
FOREVER_S = 86400.0
# Whoever lists a folder can keep it locked in the kernel, and hold up all new look-ups in it. So what the daemon's
# owner, and the daemon itself, must come to lies in one that nobody else may list, nor look into.
_FOLDER_MODES = {
    names.SNAPSHOTS: 0o755,
    names.META: 0o555,
    names.PROCESSORS: 0o555,
    names.OWNER: 0o700,
}
_SECTOR = 512
# For how long whoever could not delete a file in a snapshot is not to delete the snapshot; of so many of them.
_EMPTYING_S = 10.0
_EMPTYING_MAX = 4096
_WRITE_FLAGS = os.O_WRONLY | os.O_RDWR


class NoEntryError(NotFoundError):
    """There is no such name in the tree."""


class GoneError(NoEntryError):
    """The inode is of nothing any more. The kernel looks the name up again, and tells its user what it finds then."""

    errno = errno.ESTALE


class NotEmptyError(SnapfsError):
    """What was in a folder could not be deleted, and so the folder is not."""

    errno = errno.ENOTEMPTY


class IsFolderError(SnapfsError):
    """What was asked for works on files."""

    errno = errno.EISDIR


class Node(NamedTuple):
    """An inode's attributes. ``entry_timeout_s`` is for how long its name holds."""

    inode: int
    mode: int
    uid: int
    gid: int
    size_bytes: int = 0
    block_count_512: int = 0
    link_count: int = 1
    atime_ns: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    attr_timeout_s: float = 0.0
    entry_timeout_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks, by process and user."""

    pid: int
    uid: int
    gid: int


class Namespace:
    """The tree of one mount.

    ``helper_pid`` is the process through which the daemon uses its own mount, 0 while there is none.
    ``writer_counts`` counts the open files that can leave dirty pages in the kernel.
    """

    def __init__(
        self,
        pool: Pool,
        mount_point: str,
        resize_file: ResizeFile,
        forget_pages: ForgetPages,
        control_gid: int | None = None,
    ) -> None:
        self.pool = pool
        self.mount_point = mount_point
        self.helper_pid = 0
        self._helped: Volume | None = None
        self.writer_counts: dict[VolumeId, int] = {}
        self._uid = os.getuid()
        self._gid = os.getgid()
        self._mounted_ns = time.time_ns()
        self._control = CommandContext(pool, resize_file, forget_pages)
        self._control_gid = control_gid
        self._control_numbers = names.ControlNumbers()
        self._manifests = Manifests(pool)
        self._open_snapshot_files: dict[int, list[SnapshotHandle]] = {}
        self._emptying: OrderedDict[tuple[int, int], float] = OrderedDict()
        self._files: dict[int, tuple[bytes, int]] = {
            names.CONTROL: (b"control", 0o600 if control_gid is None else 0o660),
            names.STATUS: (b"status.json", 0o444),
            names.EVENTS: (b"events", 0o644),
        }

    # -- looking up --------------------------------------------------------------------------

    async def lookup(self, parent: int, name: bytes, caller: Caller) -> Node:
        """The node of a name in a folder. Raises NoEntryError."""
        if len(name) > NAME_MAX_BYTES:
            raise NameTooLongError("no name is so long", f"Names have at most {NAME_MAX_BYTES} bytes")
        if name == b".":
            # Of any inode: that is how whoever has a handle of a file (open_by_handle_at(2), an NFS server) finds it.
            return self.as_seen_by(caller, await self.node(parent))
        if parent == names.ROOT:
            return self._lookup_in_root(name)
        if parent == names.SNAPSHOTS:
            if name == b"..":
                return await self.node(names.ROOT)
            if name[:1] == b"@":
                return self._moment_node(name)
            snapshot = self.pool.snapshots.by_name.get(name)
            if snapshot is None:
                raise NoEntryError("there is no such snapshot")
            return self._snapshot_node(snapshot)
        if names.is_snapshot_folder(parent):
            return await self._lookup_in_snapshot(parent, name, caller)
        inode = self._lookup_in_meta(parent, name, caller)
        node = self.as_seen_by(caller, await self.node(inode))
        # A volume under its number is for the helper alone: the kernel must ask each time.
        return node._replace(entry_timeout_s=0.0) if names.volume_id_of(inode) is not None else node

    def _moment_node(self, name: bytes) -> Node:
        """The last snapshot at or before a moment, which is not listed."""
        try:
            snapshot = self.pool.snapshots.at(parse_moment(show_name(name[1:]), time.time_ns()))
        except (BadNameError, NotFoundError):
            raise NoEntryError("there is no snapshot of that moment") from None
        # Of another snapshot soon: the kernel must ask each time.
        return self._snapshot_node(snapshot)._replace(inode=names.of_moment(snapshot.snapshot_id), entry_timeout_s=0.0)

    def _lookup_in_root(self, name: bytes) -> Node:
        volume = self.pool.volumes.by_name.get(name)
        if volume is not None:
            return self.volume_node(volume)
        inode = {
            names.SNAPSHOTS_NAME: names.SNAPSHOTS,
            names.META_NAME: names.META,
            b"..": names.ROOT,
        }.get(name)
        if inode is None:
            raise NoEntryError("there is no such volume")
        return self._folder_node(inode)

    async def _lookup_in_snapshot(self, parent: int, name: bytes, caller: Caller) -> Node:
        snapshot = self._snapshot(parent)
        if name == MANIFEST_NAME:
            return self._manifest_node(snapshot, *await self._manifests.look_up(snapshot, caller.pid))
        if name == b"..":
            return await self.node(names.SNAPSHOTS)
        members = await self.pool.snapshots.members(snapshot)
        volume_id = members.by_name.get(name)
        if volume_id is None:
            raise NoEntryError("the snapshot holds no such volume")
        return await self.node(names.of_snapshot_volume(snapshot.snapshot_id, volume_id))

    def _manifest_node(self, snapshot: Snapshot, inode: int, size_bytes: int) -> Node:
        when = snapshot.created_ns
        mode = stat.S_IFREG | 0o444
        return Node(inode, mode, self._uid, self._gid, size_bytes, 0, 1, when, when, when)

    def _lookup_in_meta(self, parent: int, name: bytes, caller: Caller) -> int:
        if parent == names.META:
            for inode, (file_name, _) in self._files.items():
                if name == file_name:
                    return self._control_numbers.another() if inode == names.CONTROL else inode
            special = {
                b"processors": names.PROCESSORS,
                names.OWNER_NAME: names.OWNER,
                b"..": names.ROOT,
            }.get(name)
            if special is not None:
                return special
        if parent == names.OWNER:
            # The helper cuts the events.
            special = {self._files[names.EVENTS][0]: names.EVENTS, b"..": names.META}.get(name)
            if special is not None:
                return special
            if name == self._files[names.CONTROL][0]:
                return self._control_numbers.another()
            if self._is_helper(caller):
                return self._alias(name)
        if parent == names.PROCESSORS:
            for processor in self.pool.processors:
                if name == b"%d.json" % processor.index:
                    return names.of_processor(processor.index)
            if name == b"..":
                return names.META
        raise NoEntryError("there is no such file")

    def as_seen_by(self, caller: Caller, node: Node) -> Node:
        """The attributes that the kernel is to hold a caller's rights against.

        A volume that its owner or mode keeps from the daemon's user is that user's for the helper; the kernel asks
        again for whoever comes next. Who comes amid what the helper does has the kernel see the volume as it is: the
        helper tries again then.
        """
        if self._uid == 0 or not self._is_helper(caller) or names.volume_id_of(node.inode) is None:
            return node
        if node.uid == self._uid and node.mode & 0o600 == 0o600:
            return node
        return node._replace(mode=stat.S_IFREG | 0o600, uid=self._uid, gid=self._gid, attr_timeout_s=0.0)

    def note_helper(self, pid: int) -> None:
        """Another process is the helper now, 0 for none."""
        self.helper_pid = pid

    def begin_help(self) -> None:
        """The helper begins something."""
        self._helped = None

    def help_progress(self) -> object:
        """Another value whenever the volume that the helper has opened was written to; see :class:`HelperProcess`."""
        return None if self._helped is None else self.progress_of(self._helped)

    def progress_of(self, volume: Volume) -> object:
        """Another value whenever a volume was written to; None while a request for it is under way here."""
        if volume.request_count:
            return None
        return volume.file_id, volume.mtime_ns, volume.failed_write_count

    def _is_helper(self, caller: Caller) -> bool:
        return caller.pid == self.helper_pid != 0

    def _alias(self, name: bytes) -> int:
        """A volume by its id, for the daemon's own use: its name may change meanwhile."""
        try:
            volume_id = VolumeId(int(name))
        except ValueError:
            raise NoEntryError("there is no such file") from None
        if volume_id not in self.pool.volumes.by_file_id:
            raise NoEntryError("there is no such volume")
        return names.of_volume(volume_id)

    def _snapshot(self, inode: int) -> Snapshot:
        snapshot = self.pool.snapshots.by_id.get(names.snapshot_id_of(inode))
        if snapshot is None:
            raise NoEntryError("the snapshot is deleted")
        return snapshot

    # -- nodes -------------------------------------------------------------------------------

    async def node(self, inode: int) -> Node:
        """The attributes of an inode. Raises NoEntryError."""
        volume_id = names.volume_id_of(inode)
        snapshot_id = names.snapshot_id_of(inode)
        if snapshot_id:
            return await self._node_in_snapshot(inode, volume_id)
        if volume_id is not None:
            volume = self.pool.volumes.by_file_id.get(volume_id)
            if volume is None:
                raise GoneError("the volume is removed")
            return self.volume_node(volume)
        if names.is_control(inode):
            return self._control_node(inode)
        if inode in self._files:
            return self._file_node(inode, self._files[inode][1])
        if names.processor_index_of(inode) is not None:
            return self._file_node(inode, 0o444)
        return self._folder_node(inode)

    def volume_node(self, volume: Volume) -> Node:
        """The attributes of a live volume."""
        return Node(
            names.of_volume(volume.file_id),
            stat.S_IFREG | volume.mode,
            volume.uid,
            volume.gid,
            volume.size_bytes,
            self._shown_blocks_of(volume),
            0 if volume.is_removed else 1,
            volume.atime_ns,
            volume.mtime_ns,
            volume.ctime_ns,
            VOLUME_ATTR_TIMEOUT_S,
            FOREVER_S,
        )

    def _shown_blocks_of(self, volume: Volume) -> int:
        """Of a live volume. The kernel may have pages of one that is written to: it is not called without blocks."""
        shown = self._shown_blocks(volume.volume_id, volume.size_bytes, volume.block_count)
        is_written = volume.file_id in self.writer_counts
        return max(1, -(-volume.size_bytes // _SECTOR)) if is_written and not shown else shown

    def _shown_blocks(self, volume_id: VolumeId, size_bytes: int, block_count: int | None) -> int:
        """The blocks of 512 bytes that ``stat`` tells.

        Where they are not known, or not all are counted (of what stands on a copy-on-write volume), as many as the
        size has in place of none: ``tar --sparse`` takes a file without blocks for a hole, and does not read it.
        """
        if block_count:
            return block_count * (BLOCK_SIZE // _SECTOR)
        is_counted = block_count is not None and not self.pool.lost
        if is_counted and not stands_on_cow(self.pool.volumes.traits, volume_id):
            return 0
        return -(-size_bytes // _SECTOR)

    async def _node_in_snapshot(self, inode: int, volume_id: VolumeId | None) -> Node:
        if volume_id is None:
            snapshot = self._snapshot(inode)
            if names.is_manifest(inode):
                return self._manifest_node(snapshot, inode, self._manifests.size_bytes(snapshot))
            return self._snapshot_node(snapshot)._replace(inode=inode)
        try:
            return await self._member_node(inode, volume_id)
        except NoEntryError:
            if inode not in self._open_snapshot_files:
                raise
            # Deleted; it stays until it is closed.
            view = self._open_snapshot_files[inode][0].snapshot_volume
            return self._snapshot_file_node(inode, view.volume_id, view.attributes, None)

    async def _member_node(self, inode: int, volume_id: VolumeId) -> Node:
        """The attributes of a volume in a snapshot. Raises NoEntryError, also when it is deleted meanwhile."""
        members = await self.pool.snapshots.members(self._snapshot(inode))
        attributes = members.by_id.get(volume_id)
        if attributes is None:
            raise NoEntryError("the snapshot holds no such volume")
        # Of what is deleted the counts may be gone.
        self._snapshot(inode)
        return self._snapshot_file_node(inode, volume_id, attributes, members.block_counts.get(volume_id, 0))

    def _snapshot_file_node(
        self, inode: int, volume_id: VolumeId, attributes: Attributes, block_count: int | None
    ) -> Node:
        return Node(
            inode,
            stat.S_IFREG | attributes.mode,
            attributes.uid,
            attributes.gid,
            attributes.size_bytes,
            self._shown_blocks(volume_id, attributes.size_bytes, block_count),
            1,
            attributes.atime_ns,
            attributes.mtime_ns,
            attributes.ctime_ns,
            FOREVER_S,
            FOREVER_S,
        )

    def _snapshot_node(self, snapshot: Snapshot) -> Node:
        when = snapshot.created_ns
        return Node(
            names.of_snapshot(snapshot.snapshot_id),
            # What its owner would change comes to be refused here (EROFS), and seen: see :meth:`remove_folder`.
            stat.S_IFDIR | 0o755,
            self._uid,
            self._gid,
            link_count=2,
            atime_ns=when,
            mtime_ns=when,
            ctime_ns=when,
            attr_timeout_s=FOREVER_S,
            # What is deleted or renamed past the kernel is told to it.
            entry_timeout_s=FOREVER_S,
        )

    def _folder_node(self, inode: int) -> Node:
        if inode == names.ROOT:
            return self._volumes_folder_node()
        mode = _FOLDER_MODES.get(inode)
        if mode is None:
            raise NoEntryError("there is no such inode")
        changed_ns = self._mounted_ns
        if inode == names.SNAPSHOTS:
            changed_ns = self.pool.snapshots.names_changed_ns or changed_ns
        return Node(
            inode,
            stat.S_IFDIR | mode,
            self._uid,
            self._gid,
            link_count=2,
            atime_ns=self._mounted_ns,
            mtime_ns=changed_ns,
            ctime_ns=changed_ns,
            attr_timeout_s=1.0,
            entry_timeout_s=FOREVER_S,
        )

    def _volumes_folder_node(self) -> Node:
        folder = self.pool.volumes.folder
        return Node(
            names.ROOT,
            stat.S_IFDIR | folder.mode,
            folder.uid,
            folder.gid,
            link_count=2,
            atime_ns=folder.atime_ns,
            mtime_ns=folder.mtime_ns,
            ctime_ns=folder.ctime_ns,
            attr_timeout_s=1.0,
            entry_timeout_s=FOREVER_S,
        )

    def _file_node(self, inode: int, mode: int) -> Node:
        size = len(self.pool.events.contents) if inode == names.EVENTS else 0
        now = time.time_ns()
        return Node(inode, stat.S_IFREG | mode, self._uid, self._gid, size, 0, 1, now, now, now, 0.0, FOREVER_S)

    def _control_node(self, inode: int) -> Node:
        """The kernel must ask for its number each time."""
        node = self._file_node(inode, self._files[names.CONTROL][1])
        return node._replace(gid=self._gid if self._control_gid is None else self._control_gid, entry_timeout_s=0.0)

    # -- folders -----------------------------------------------------------------------------

    async def listing(self, inode: int) -> list[tuple[int, int]]:
        """A folder's entries, as offset and inode, in the order of the offsets, in which they are told.

        An entry keeps its offset whatever comes and goes beside it: who lists in pieces, opening the folder anew for
        each as an NFS server does, misses none that is there.
        """
        if inode == names.ROOT:
            volumes = [(one, int(one)) for one in sorted(self.pool.volumes.by_file_id)]
            return [(1, names.SNAPSHOTS), (2, names.META), *volumes]
        if inode == names.SNAPSHOTS:
            return [(one, names.of_snapshot(one)) for one in sorted(self.pool.snapshots.by_id)]
        if inode == names.META:
            return list(enumerate([*self._files, names.PROCESSORS, names.OWNER], 1))
        if inode == names.OWNER:
            return [(1, names.CONTROL), (2, names.EVENTS)]
        if inode == names.PROCESSORS:
            return [(one.index + 1, names.of_processor(one.index)) for one in self.pool.processors]
        snapshot = self._snapshot(inode)
        members = await self.pool.snapshots.members(snapshot)
        # A pool of an earlier version may have a volume with the manifest's name: that stands for the manifest.
        hidden_id = members.by_name.get(MANIFEST_NAME)
        found = [
            (int(one), names.of_snapshot_volume(snapshot.snapshot_id, one))
            for one in members.ordered_ids
            if one != hidden_id
        ]
        return [(1, names.of_manifest(snapshot.snapshot_id)), *found]

    async def entry(self, inode: int) -> tuple[bytes, Node] | None:
        """Name and attributes of an inode in a listing; None if it has gone meanwhile."""
        try:
            name = await self._name_of(inode)
            if name is None:
                return None
            return name, await self.node(inode)
        except NotFoundError:
            return None

    async def _name_of(self, inode: int) -> bytes | None:
        volume_id = names.volume_id_of(inode)
        if names.snapshot_id_of(inode):
            snapshot = self._snapshot(inode)
            if names.is_snapshot_folder(inode):
                return snapshot.name
            if volume_id is None:
                return MANIFEST_NAME
            members = await self.pool.snapshots.members(snapshot)
            return members.by_id[volume_id].name
        if volume_id is not None:
            volume = self.pool.volumes.by_file_id.get(volume_id)
            return None if volume is None or volume.is_removed else volume.name
        if inode in self._files:
            return self._files[inode][0]
        index = names.processor_index_of(inode)
        if index is not None:
            return b"%d.json" % index
        return {
            names.SNAPSHOTS: names.SNAPSHOTS_NAME,
            names.META: names.META_NAME,
            names.PROCESSORS: b"processors",
            names.OWNER: names.OWNER_NAME,
        }.get(inode)

    # -- opening -----------------------------------------------------------------------------

    async def open(self, inode: int, flags: int, caller: Caller) -> Handle:
        """Open a file. Raises ReadOnlyError for a snapshot's that is to be written."""
        if names.snapshot_id_of(inode):
            if flags & (_WRITE_FLAGS | os.O_TRUNC):
                raise ReadOnlyError("a snapshot cannot be changed", "Copy the file, and change the copy")
            return await self._open_in_snapshot(inode, caller)
        volume_id = names.volume_id_of(inode)
        if volume_id is not None:
            volume = self.pool.volumes.by_file_id.get(volume_id)
            if volume is None:
                raise GoneError("the volume is removed")
            if not self._is_helper(caller):
                self._refuse_in_rollback(volume)
            if flags & os.O_TRUNC:
                await self.pool.volumes.truncate(volume, 0)
            return self._open_volume(volume, flags, caller)
        if names.is_control(inode):
            self.pool.hooks.refuse_inside(caller.pid)
            is_owner = caller.uid in (0, self._uid)
            self._control_numbers.opened(inode)
            return ControlHandle(ControlSession(replace(self._control, is_owner=is_owner)), inode)
        if inode == names.EVENTS:
            if flags & (_WRITE_FLAGS | os.O_TRUNC):
                raise NotPermittedError("events are told by the daemon alone")
            return EventsHandle(self.pool.events)
        if inode == names.STATUS:
            return TextHandle(_json(await pool_status(self.pool, self.mount_point)))
        index = names.processor_index_of(inode)
        if index is not None:
            return TextHandle(_json(await processor_status(self.pool.processors[index])))
        raise IsFolderError("it is a folder")

    def _refuse_in_rollback(self, volume: Volume) -> None:
        """The kernel looked at the mode and the owner of before, which others come in place of."""
        if volume.file_id in self.pool.clones.stale:
            raise StaleVolumeError(
                "the volume was rolled back, and the kernel keeps the size that it had",
                "Try again in a moment, or unmount and mount",
            )
        if volume in self.pool.clones.rolling_back:
            raise BusyVolumeError("the volume is being rolled back", "Try again in a moment")

    def _open_volume(self, volume: Volume, flags: int, caller: Caller) -> VolumeHandle:
        is_writer = bool(flags & _WRITE_FLAGS)
        if not self._is_helper(caller):
            # Again: it may have begun meanwhile.
            self._refuse_in_rollback(volume)
        else:
            self._helped = volume
        self.pool.volumes.open(volume)
        if is_writer:
            self.writer_counts[volume.file_id] = self.writer_counts.get(volume.file_id, 0) + 1
        is_synced = is_writer and bool(flags & os.O_DSYNC)
        return VolumeHandle(volume, is_writer=is_writer, is_flusher=self._is_helper(caller), is_synced=is_synced)

    async def _open_in_snapshot(self, inode: int, caller: Caller) -> Handle:
        snapshot = self._snapshot(inode)
        volume_id = names.volume_id_of(inode)
        if volume_id is None:
            return TextHandle(await self._manifests.opened(snapshot, inode, caller.pid))
        handle = SnapshotHandle(await self.pool.snapshots.open_volume(snapshot, volume_id))
        self._open_snapshot_files.setdefault(inode, []).append(handle)
        return handle

    def close(self, handle: Handle) -> None:
        """Undo :meth:`open`."""
        if isinstance(handle, VolumeHandle):
            volume = handle.volume
            if handle.is_writer:
                self.writer_counts[volume.file_id] -= 1
                if not self.writer_counts[volume.file_id]:
                    del self.writer_counts[volume.file_id]
            self.pool.volumes.close(volume)
        elif isinstance(handle, ControlHandle):
            self._control_numbers.closed(handle.inode)
            handle.close()
        elif isinstance(handle, SnapshotHandle):
            view = handle.snapshot_volume
            inode = names.of_snapshot_volume(view.snapshot.snapshot_id, view.volume_id)
            self._open_snapshot_files[inode].remove(handle)
            if not self._open_snapshot_files[inode]:
                del self._open_snapshot_files[inode]
            self.pool.snapshots.close_volume(view)

    # -- changing ----------------------------------------------------------------------------

    async def create(self, parent: int, name: bytes, mode: int, caller: Caller) -> Volume:
        """Make a volume."""
        self._only_in_root(parent)
        folder = self.pool.volumes.folder
        gid = folder.gid if folder.mode & stat.S_ISGID else caller.gid
        return await self.pool.volumes.create(name, mode & 0o777, caller.uid, gid)

    async def remove_file(self, parent: int, name: bytes, caller: Caller) -> None:
        """Remove a volume."""
        if names.snapshot_id_of(parent):
            self._note_emptying(parent, caller)
        self._only_in_root(parent)
        if name in (names.SNAPSHOTS_NAME, names.META_NAME):
            raise IsFolderError("it is a folder")
        await self.pool.volumes.remove(name)

    async def make_folder(self, parent: int, name: bytes) -> Node:
        """Make a snapshot: a folder in ``.snapshots``."""
        if parent != names.SNAPSHOTS:
            self._refuse_in_snapshot(parent)
            raise NotPermittedError("volumes lie in one folder", "To make a snapshot: mkdir .snapshots/NAME")
        return self._snapshot_node(await self.pool.snapshots.create(name))

    def _note_emptying(self, parent: int, caller: Caller) -> None:
        """Somebody tries to delete what a snapshot holds, and would delete the snapshot next."""
        key = (_process_of(caller.pid), names.snapshot_id_of(parent))
        self._emptying[key] = time.monotonic()
        self._emptying.move_to_end(key)
        while len(self._emptying) > _EMPTYING_MAX:
            self._emptying.popitem(last=False)

    def _refuse_emptied(self, name: bytes, caller: Caller) -> None:
        """Who deletes a tree, as ``rsync --delete`` does, goes on to the folder when its files could not be deleted.

        All snapshots would go with the volumes by that. A folder of which not all could be deleted is not empty.
        """
        snapshot = self.pool.snapshots.by_name.get(name)
        since_s = self._emptying.get((_process_of(caller.pid), 0 if snapshot is None else snapshot.snapshot_id))
        # Process 0 is everyone whom the daemon does not see (PID namespaces).
        if not caller.pid or since_s is None or time.monotonic() - since_s > _EMPTYING_S:
            return
        raise NotEmptyError(
            "what the snapshot holds could not be deleted by whoever deletes it now",
            "To delete the snapshot: rmdir, or snapfs delete",
        )

    async def remove_folder(self, parent: int, name: bytes, caller: Caller) -> None:
        """Delete a snapshot."""
        if parent != names.SNAPSHOTS:
            self._refuse_in_snapshot(parent)
            raise NotPermittedError("this folder is snapfs' own")
        self._refuse_emptied(name, caller)
        await self.pool.snapshots.delete(name, by_kernel=True)

    async def rename(
        self, parent: int, name: bytes, new_parent: int, new_name: bytes, *, replace: bool, exchange: bool
    ) -> None:
        """Rename a volume or a snapshot."""
        for folder in (parent, new_parent):
            self._refuse_in_snapshot(folder)
        if parent == new_parent == names.ROOT:
            if name in (names.SNAPSHOTS_NAME, names.META_NAME):
                raise ReservedNameError("this folder is snapfs' own")
            await self.pool.volumes.rename(name, new_name, replace=replace, exchange=exchange)
        elif parent == new_parent == names.SNAPSHOTS:
            await self.pool.snapshots.rename(name, new_name, by_kernel=True)
        else:
            raise NotPermittedError("a volume is not a snapshot", "To make a snapshot: mkdir .snapshots/NAME")

    async def change(self, inode: int, change: AttributeChange, size_bytes: int | None, caller: Caller) -> Node:
        """Change attributes of a volume.

        Raises:
            BusyVolumeError: it is being rolled back.
        """
        if names.snapshot_id_of(inode):
            raise ReadOnlyError("a snapshot cannot be changed")
        volume_id = names.volume_id_of(inode)
        if inode == names.ROOT:
            return await self._change_folder(change)
        if volume_id is None:
            if (names.is_control(inode) or inode == names.EVENTS) and change.only_times:
                # `echo command > control` truncates first; the events are cut by the daemon itself.
                return await self.node(inode)
            raise NotPermittedError("this file is snapfs' own")
        volume = self.pool.volumes.by_file_id.get(volume_id)
        if volume is None:
            if size_bytes is None and change.only_times:
                # Of a file that was removed and that nobody has open the kernel still hands the times over. It would
                # keep an error, and tell it to whoever opens the file after a rollback has brought it back.
                return Node(inode, stat.S_IFREG, self._uid, self._gid, link_count=0)
            raise GoneError("the volume is removed")
        changes_more_than_times = size_bytes is not None or not change.only_times
        if changes_more_than_times and not self._is_helper(caller):
            self._refuse_in_rollback(volume)
        with volume.requested():
            if size_bytes is not None:
                await self.pool.volumes.truncate(volume, size_bytes)
            if change != AttributeChange():
                await self.pool.volumes.change(volume, change)
        return self.as_seen_by(caller, self.volume_node(volume))

    async def _change_folder(self, change: AttributeChange) -> Node:
        owner = self.pool.volumes.folder.uid
        if self._uid != 0 and change.uid not in (None, owner):
            raise NotPermittedError("the daemon comes to its volumes as the owner of their folder")
        if change != AttributeChange():
            await self.pool.volumes.change_folder(change)
        return self._volumes_folder_node()

    def refuse_link(self, parent: int) -> None:
        """Links, device files and the like: none."""
        self._refuse_in_snapshot(parent)
        raise NotPermittedError("snapfs holds volumes and nothing else")

    def _only_in_root(self, parent: int) -> None:
        self._refuse_in_snapshot(parent)
        if parent != names.ROOT:
            raise NotPermittedError("volumes lie in the mount's own folder")

    def _refuse_in_snapshot(self, parent: int) -> None:
        if names.snapshot_id_of(parent):
            raise ReadOnlyError("a snapshot cannot be changed", "Copy the file, and change the copy")

    async def space(self) -> tuple[Space, int]:
        """Room on the devices that tell soon, and how many files there are."""
        return space_in(await self.pool.watch.rooms()), len(self.pool.volumes.by_name)


def _process_of(thread_id: int) -> int:
    """The process of a thread, by which the kernel calls whoever asks; itself where that cannot be seen (proc(5))."""
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{thread_id}/status") as file:
        for line in file:
            if line.startswith("Tgid:"):
                return int(line.split()[1])
    return thread_id


def _json(document: dict[str, object]) -> bytes:
    return json.dumps(document, indent=1).encode() + b"\n"
