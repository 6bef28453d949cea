"""The composition root: a pool, a namespace, pyfuse3, signals. One mount a process, as pyfuse3 has it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial

import pyfuse3
import trio

from .beneath import files_beneath
from .errors import MountError
from .events import EventLog
from .fuse import loop
from .fuse.helper import MNT_DETACH
from .fuse.kernelevents import KernelEvents
from .fuse.kernelnames import KernelNames
from .fuse.names import EVENTS, SNAPSHOTS, of_volume
from .fuse.namespace import Namespace
from .fuse.operations import Operations
from .fuse.ownmount import FlushError, OwnMount
from .mountpoint import KNOWN_OPTIONS, MountRequest, check_mount_point, check_options, control_gid, offering_rescue
from .pool import Pool, open_pool
from .rescue import open_damaged_pool
from .tasks import kept_up
from .volume import Volume

_log = logging.getLogger("snapfs")
_libc = ctypes.CDLL(None, use_errno=True)
_PR_SET_IO_FLUSHER = 57
_OOM_SCORE = b"-500"
# mallopt(3). With one arena for each of its threads the daemon had 122 MiB after 1,480 rounds of snapshots, clones,
# rollbacks and listings, with one for all 82 after 1,400; threads seldom allocate at the same time.
_M_ARENA_MAX = -8
_STOP_S = 10.0
# After an unmount, of a mount that is seen nowhere else.
_ENDS_BY_ITSELF_S = 3.0
_MEND_S = 2.0
_MEND_S_MAX = 60.0
_CONNECTIONS = "/sys/fs/fuse/connections"
_OPEN_FILES_MAX = 65536
WORKERS_MIN = 8
WORKERS_MAX = 256
# Fewer than the workers, so that there is always one for what is not in the background.
BACKGROUND_MAX = 192
READ_AHEAD_KIB = 1024
DIRTY_RATIO_MAX = 40


async def serve(request: MountRequest, ready: Callable[[Sequence[str]], None]) -> None:
    """Mount and serve until unmounted or told to stop.

    ``ready`` is called when the mount answers, with what of a damaged pool is lost.
    """
    check_options(request.options)
    check_mount_point(request)
    _prepare_process()
    purpose = f"mounted on {request.mount_point}"
    opened = open_damaged_pool(request.pool_path) if request.is_rescue else open_pool(request.pool_path, purpose)
    async with contextlib.AsyncExitStack() as stack:
        with offering_rescue(request):
            pool = await stack.enter_async_context(opened)
        mount = _Mount(request, pool)
        await mount.serve(partial(ready, pool.lost))


class _Mount:
    """One mounted pool."""

    def __init__(self, request: MountRequest, pool: Pool) -> None:
        self._mount_point = request.mount_point
        self._pool = pool
        self._options = _fuse_options(request)
        self._namespace = Namespace(
            pool, request.mount_point, self._resize, self._forget_range, control_gid(request.options)
        )
        self._kernel_names = KernelNames(_forget_snapshot_name)
        self._operations = Operations(self._namespace, self._kernel_names)
        self._own_mount = OwnMount(
            self._namespace,
            request.mount_point,
            partial(self._kernel_names.tell, _forget_pages),
        )
        self._own_mount.note_lost = self._operations.note_lost
        self._kernel_events = KernelEvents(
            pool.events, partial(self._kernel_names.tell, _store_events), self._own_mount.cut_events
        )
        pool.snapshots.before_cut = self._own_mount.flush
        pool.snapshots.forget_name = self._kernel_names.forget
        pool.maker.is_own_path = self._is_own_path
        pool.clones.before_rollback = self._own_mount.check_refreshable
        pool.clones.after_rollback = self._own_mount.refresh
        self._device = 0
        self._has_ended = False
        self._failure: MountError | None = None
        self._session = loop.enable(pool.pending.calls, pool.pending.answered)
        pool.demand.count = lambda: self._operations.block_request_count
        pool.hooks.mount_point = os.path.abspath(request.mount_point)

    async def _forget_range(self, volume: Volume, offset: int, length: int) -> None:
        with contextlib.suppress(OSError):
            await self._kernel_names.tell(self._session.forget_range, of_volume(volume.file_id), offset, length)

    def _is_own_path(self, path: str) -> bool:
        """Whether a file lies in the mount or in the pool, or on a loop device over what does: it waits for itself."""
        paths = [os.path.realpath(one) for one in (path, *files_beneath(path))]
        roots = [self._mount_point, *(device.local_path("") for device in self._pool.devices.values())]
        roots.append(self._pool.home.local_path(""))
        folders = [os.path.realpath(root).rstrip("/") + os.sep for root in roots if root]
        return any((real + os.sep).startswith(folder) for real in paths for folder in folders)

    async def _resize(self, name: bytes, size_bytes: int) -> None:
        await self._own_mount.resize(name, size_bytes)

    async def serve(self, ready: Callable[[], None]) -> None:
        await self._own_mount.start()
        try:
            await self._serve(ready)
        finally:
            await self._own_mount.stop()
        failure = self._session.failure or self._failure
        if failure is not None:
            raise failure

    async def _serve(self, ready: Callable[[], None]) -> None:
        gc.collect()
        gc.freeze()
        # From before there is a mount: ended in between, it would be left without a daemon.
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            await self._serve_until_told(ready, signals)

    async def _serve_until_told(self, ready: Callable[[], None], signals: AsyncIterator[int]) -> None:
        try:
            pyfuse3.init(self._operations, self._mount_point, self._options)
        except RuntimeError as error:
            raise MountError(
                f"{self._mount_point} cannot be mounted on ({error})",
                "See above for what fusermount3 says; is /dev/fuse there, and user_allow_other set in /etc/fuse.conf?",
            ) from error
        events = self._pool.events
        events.on_line = self._kernel_events.note_line
        events.on_cut = self._kernel_events.note_cut
        events.note("mounted", mount_point=self._mount_point, pid=os.getpid())
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stop_on_signals, signals)
                nursery.start_soon(self._abort_when_cancelled)
                nursery.start_soon(self._tell_when_ready, ready)
                nursery.start_soon(kept_up, self._kernel_events.run, self._pool.note_no_memory)
                nursery.start_soon(kept_up, self._mend_stale, self._pool.note_no_memory)
                if "ro" not in self._options:
                    nursery.start_soon(kept_up, self._pool.scheduler.run, self._pool.note_no_memory)
                await pyfuse3.main(WORKERS_MIN, WORKERS_MAX)
                self._has_ended = True
                nursery.cancel_scope.cancel()
        finally:
            events.on_line, events.on_cut = EventLog().on_line, EventLog().on_cut
            self._operations.close_all()
            if not await self._kernel_names.close():
                # It waits in the kernel for a request that was never taken from it, and that ends it.
                _abort_connection(self._device)
            if await self._kernel_names.close():
                # By its path: what is seen there by now may be another's.
                pyfuse3.close(unmount=await self._own_mount.is_in_place())
            else:
                _log.error("the kernel still waits for an answer; end that with: umount -f %s", self._mount_point)
            events.note("unmounted", mount_point=self._mount_point)

    async def _tell_when_ready(self, ready: Callable[[], None]) -> None:
        try:
            device = self._device = await self._own_mount.device_number()
        except OSError as error:
            # Somebody unmounted it before it had answered, say. It ends in order.
            self._failure = MountError(
                f"the mount on {self._mount_point} did not answer ({error.strerror})", "Try again"
            )
            pyfuse3.terminate()
            return
        if os.geteuid() == 0:
            _tune_mount(device)
        ready()

    async def _abort_when_cancelled(self) -> None:
        """When a task of the pool has failed, let nobody wait for an answer that does not come any more.

        One of those who wait may be our own helper, for whom in turn a request waits, whatever is cancelled.
        """
        try:
            await trio.sleep_forever()
        finally:
            if not self._has_ended:
                self._session.abort()

    async def _mend_stale(self) -> None:
        """Volumes of which the kernel keeps what they were before a rollback are tried again, less and less often."""
        rest_s = _MEND_S
        while True:
            await trio.sleep(rest_s)
            has_mended = not self._pool.clones.stale or await self._pool.clones.mend_stale()
            rest_s = _MEND_S if has_mended else min(2 * rest_s, _MEND_S_MAX)

    async def _stop_on_signals(self, signals: AsyncIterator[int]) -> None:
        async for number in signals:
            _log.info("stopping on %s", signal.Signals(number).name)
            await self._stop()

    async def _stop(self) -> None:
        """Unmount, with nothing of what was written left in the kernel.

        A plain unmount has the kernel write all back; the session then ends by itself. While the
        mount is busy: no new opens first, then each open volume is flushed, then the session ends. So
        too when its path leads elsewhere by now, where nothing is taken away, and when the mount is seen elsewhere
        besides, in the namespace of another process, say, for which it stays.
        """
        self._pool.jobs.stop()
        try:
            await self._own_mount.unmount()
            # The session has ended by then, and this with it.
            await trio.sleep(_ENDS_BY_ITSELF_S)
            _log.warning("the mount is seen elsewhere too, and is ended there as well")
        except OSError as error:
            _log.warning("the mount is taken away although it cannot be unmounted: %s", error)
        try:
            await self._own_mount.detach()
        except (OSError, FlushError) as failed:
            _log.error("the kernel could not write all back: %s", failed)
        # Before requests go without answers: what is under way waits for some.
        await self._kernel_names.close()
        pyfuse3.terminate()
        # What does not end by then may wait for the mount itself.
        await trio.sleep(_STOP_S)
        self._session.abort()


def _forget_pages(inode: int) -> None:
    """Have the kernel forget what it keeps of an inode; one that it does not know is forgotten."""
    with contextlib.suppress(OSError):
        pyfuse3.invalidate_inode(inode, attr_only=False)


def _forget_snapshot_name(name: bytes) -> None:
    """Have the kernel look a snapshot's name up again. Waits for requests on that folder."""
    with contextlib.suppress(OSError):
        pyfuse3.invalidate_entry(SNAPSHOTS, name)


def _store_events(offset: int, lines: bytes) -> None:
    """Have the kernel know that the events have grown."""
    with contextlib.suppress(OSError):
        pyfuse3.notify_store(EVENTS, offset, lines)


def _fuse_options(request: MountRequest) -> set[str]:
    options = {"default_permissions", "fsname=snapfs", "subtype=snapfs", "nosuid", "nodev"}
    if request.is_rescue:
        options.add("ro")
    return options | (set(request.options & KNOWN_OPTIONS) - {"rw", "rescue"})


def _prepare_process() -> None:
    """What a storage daemon asks of the kernel; each is a help, none is needed."""
    os.umask(0o077)
    with contextlib.suppress(AttributeError):
        # There is no such thing in another library than glibc.
        _libc.mallopt(_M_ARENA_MAX, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES_MAX)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    if os.geteuid() == 0:
        # Memory it allocates must not wait for pages that it would have to write back itself.
        _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0)
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb") as score:
            score.write(_OOM_SCORE)


def _abort_connection(device: int) -> None:
    """Have the kernel fail all requests of a mount (needs root)."""
    with (
        contextlib.suppress(OSError),
        _connections() as folder,
        open(f"{folder}/{os.minor(device)}/abort", "w") as abort,
    ):
        abort.write("1")


@contextlib.contextmanager
def _connections() -> Iterator[str]:
    """The kernel's folder of FUSE connections, mounted for as long as it is needed where it is not. Raises OSError."""
    if os.listdir(_CONNECTIONS):
        yield _CONNECTIONS
        return
    if _libc.mount(b"none", _CONNECTIONS.encode(), b"fusectl", 0, None) != 0:
        raise OSError("fusectl cannot be mounted")
    try:
        yield _CONNECTIONS
    finally:
        _libc.umount2(_CONNECTIONS.encode(), MNT_DETACH)


def _tune_mount(device: int) -> None:
    """Read further ahead, and let more pages be dirty and more requests be under way, than by default (needs root).

    By default 12 direct or buffered requests that wait for a device that hangs, say, hold up all others of the mount.
    """
    with contextlib.suppress(OSError), _connections() as connections:
        for name, value in (("max_background", BACKGROUND_MAX), ("congestion_threshold", BACKGROUND_MAX * 3 // 4)):
            with open(f"{connections}/{os.minor(device)}/{name}", "w") as setting:
                setting.write(str(value))
    folder = f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}"
    for name, value in (("read_ahead_kb", READ_AHEAD_KIB), ("max_ratio", 100), ("strict_limit", 0), ("min_ratio", 20)):
        try:
            with open(f"{folder}/{name}", "w") as setting:
                setting.write(str(value))
        except OSError as error:
            _log.info("%s/%s stays as it is: %s", folder, name, error)
