"""Copying volumes out to disk images and images in, through mounts; qemu-img does what is not raw."""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

from .errors import ExistsError, MissingToolError, NotFoundError, UnreadableError, UnsupportedError

RAW = "raw"
FORMATS = (RAW, "qcow2", "vmdk", "vdi", "vpc", "vhdx")
_PIECE_BYTES = 1 << 20
# What such images begin with: by the specification of each, as file(1) knows them.
_MAGICS = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
)
# What has qemu-img make an image of the size it is given, and not of the next one that cylinders come out even with.
_EXACT = {"vpc": ("force_size=on",)}
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
OnProgress = Callable[[int, int], None]
Extents = list[tuple[int, int]]


def _opened_path(fd: int) -> str:
    """A path to what is open, whatever has its name by now; for this process and those that are given it."""
    return f"/proc/self/fd/{fd}"


def _qemu_img(*words: str, given: Iterable[int] = ()) -> str:
    """Run qemu-img, which is given open files; its words. Raises MissingToolError, UnreadableError with them."""
    tool = shutil.which("qemu-img")
    if tool is None:
        raise MissingToolError("qemu-img is not installed", "Install qemu-utils, or use the format raw")
    done = subprocess.run(
        [tool, *words], capture_output=True, text=True, errors="surrogateescape", check=False, pass_fds=tuple(given)
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
        raise UnreadableError(said[-1], "See what qemu-img info says of it")
    return done.stdout


def export_image(source: IO[bytes], extents: Extents, target: str, image_format: str, on_progress: OnProgress) -> None:
    """Copy a file of a mount to a new image; ``extents`` are where it holds data.

    Raises ExistsError when the target is there, MissingToolError, UnreadableError. What was begun is removed.
    """
    with _new_file(target, f"{target} is there already", os.fstat(source.fileno())) as image:
        if image_format == RAW:
            _export_raw(source, extents, image, on_progress)
        else:
            _export_by_qemu_img(source, target, image_format, image)


def _export_by_qemu_img(source: IO[bytes], target: str, image_format: str, image: IO[bytes]) -> None:
    """Make an image in the place of an empty file that is there.

    In a folder of our own: qemu-img opens what it is to make by a name, and who may write to the target's folder could
    have that lead elsewhere. The name is the image's own, for a format may write it down.
    """
    folder, name = os.path.split(target)
    options = [word for one in _EXACT.get(image_format, ()) for word in ("-o", one)]
    with ExitStack() as stack:
        outside = stack.enter_context(_opened_folder(folder or os.curdir))
        try:
            inside = stack.enter_context(_own_folder(outside, name))
            is_beside = True
        except OSError:
            # One in which no folder can be made, that of a mount, say.
            elsewhere = stack.enter_context(_opened_folder(tempfile.gettempdir()))
            inside = stack.enter_context(_own_folder(elsewhere, name))
            is_beside = False
        made = os.path.join(_opened_path(inside), name)
        words = ("-f", RAW, "-O", image_format, *options, "--", _opened_path(source.fileno()), made)
        _qemu_img("convert", *words, given=(source.fileno(), inside))
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=inside)
        with os.fdopen(fd, "rb", buffering=0) as finished:
            if is_beside:
                os.fchmod(fd, stat.S_IMODE(os.fstat(image.fileno()).st_mode))
                os.fsync(fd)
                _move_into(outside, inside, name, image)
            else:
                _import_raw(finished, image, _no_progress)
                os.fsync(image.fileno())


def _move_into(outside: int, inside: int, name: str, placeholder: IO[bytes]) -> None:
    """Put a file in the place of another, in the folder where that was made, whatever the folder is called by now."""
    with suppress(FileNotFoundError):
        if os.path.samestat(os.stat(name, dir_fd=outside, follow_symlinks=False), os.fstat(placeholder.fileno())):
            os.replace(name, name, src_dir_fd=inside, dst_dir_fd=outside)
            return
    raise UnreadableError(f"somebody exchanges the files or folders of {name}", "Export to a folder of your own")


@contextmanager
def _opened_folder(path: str) -> Iterator[int]:
    """A folder, only to find names in: it may be one that must not be listed."""
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _own_folder(outside: int, name: str) -> Iterator[int]:
    """A folder in another one to which only this user comes, open; it is removed again with ``name`` in it.

    By their descriptors nobody can exchange them. Raises OSError when there can be none.
    """
    with ExitStack() as stack:
        own = f".snapfs-export-{secrets.token_hex(8)}"
        os.mkdir(own, 0o700, dir_fd=outside)
        stack.callback(_remove_folder, own, outside)
        inside = os.open(own, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=outside)
        stack.callback(os.close, inside)
        if os.fstat(inside).st_uid != os.geteuid():
            raise UnreadableError("somebody exchanges folders beside the target", "Export to a folder of your own")
        stack.callback(_remove_file, name, inside)
        yield inside


def _no_progress(done: int, total: int) -> None:
    """There is nobody to tell."""


def _remove_folder(name: str, outside: int) -> None:
    with suppress(OSError):
        os.rmdir(name, dir_fd=outside)


def _remove_file(name: str, inside: int) -> None:
    with suppress(FileNotFoundError):
        os.unlink(name, dir_fd=inside)


class _HeldSignals:
    """Signals that would end this come only when they are let go: one amid the making of a file would leave it behind.

    By their handlers: blocked in one thread they would come to another, and be handled in the main thread all the same.
    """

    def __init__(self) -> None:
        self._came: list[int] = []
        self._handlers = {}
        if threading.current_thread() is threading.main_thread():
            handlers = {one: signal.getsignal(one) for one in _STOPPING}
            self._handlers = {one: handler for one, handler in handlers.items() if callable(handler)}
        for number in self._handlers:
            signal.signal(number, lambda came, frame: self._came.append(came))

    def let_go(self) -> None:
        """Have them come from now on, and what has come."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._came:
            signal.raise_signal(self._came[0])


@contextmanager
def _new_file(path: str, reason: str, like: os.stat_result) -> Iterator[IO[bytes]]:
    """A new file, for those to read who may read what it is ``like``; removed again if what is done with it fails.

    Raises ExistsError with ``reason`` when there is one.
    """
    held = _HeldSignals()
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, like.st_mode & 0o666 | 0o600)
    except FileExistsError:
        held.let_go()
        raise ExistsError(reason, "Choose another name") from None
    except BaseException:
        held.let_go()
        raise
    with os.fdopen(fd, "r+b", buffering=0) as file:
        try:
            held.let_go()
            yield file
        except BaseException as error:
            if isinstance(error, OSError) and error.filename is None:
                error.filename = path
            # Not what somebody else put in its place.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(path), os.fstat(fd)):
                    os.unlink(path)
            raise


def _export_raw(volume: IO[bytes], extents: Extents, image: IO[bytes], on_progress: OnProgress) -> None:
    total = sum(length for _, length in extents)
    done = 0
    for at, data in _pieces(volume, extents):
        # Of a live volume it is not known where it holds data.
        if data.count(0) != len(data):
            _write(image, at, data)
        done += len(data)
        on_progress(done, total)
    image.truncate(os.fstat(volume.fileno()).st_size)
    os.fsync(image.fileno())


def _pieces(file: IO[bytes], extents: Extents) -> Iterator[tuple[int, bytes]]:
    for offset, length in extents:
        done = 0
        while done < length:
            try:
                data = os.pread(file.fileno(), min(_PIECE_BYTES, length - done), offset + done)
            except OSError as error:
                # Not the file that it is copied to, which would be named.
                raise UnreadableError(
                    f"what is to be copied cannot be read at byte {offset + done}: {error.strerror}",
                    "Nothing was kept of the copy. See snapfs status, and snapfs check, for what is lost",
                ) from error
            if not data:
                raise UnreadableError("the file is shorter than it should be", "Check it, then try again")
            yield offset + done, data
            done += len(data)


def _write(file: IO[bytes], offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file.fileno(), view, offset)
        view, offset = view[count:], offset + count


def image_format_of(image: IO[bytes], path: str) -> str:
    """What kind of image a file is that was opened by a path.

    Raises MissingToolError when it is one that qemu-img must read; UnsupportedError when it stands on another file: a
    guest can write to its raw disk what makes it look so, and have any file of the host read.
    """
    if shutil.which("qemu-img") is None:
        head = os.pread(image.fileno(), 512, 0)
        for offset, magic, kind in _MAGICS:
            if head.startswith(magic, offset):
                raise MissingToolError(
                    f"{path} looks like {kind}, and qemu-img is not installed",
                    "Install qemu-utils; or say --format raw, if it is to be copied as it is",
                )
        return RAW
    opened = _opened_path(image.fileno())
    try:
        found = json.loads(_qemu_img("info", "--output", "json", "--", opened, given=[image.fileno()]))
    except UnreadableError as error:
        # What it stands on may be told relative to where it lies.
        error.fix = "If it stands on other files, and you know that: say in which format, with --format"
        raise
    for other in _others_named(found):
        if other != opened:
            raise UnsupportedError(
                f"{path} looks like {found['format']} and says that it stands on {other}",
                f"Say --format {found['format']}, if you know that; or --format raw, if it is a disk that a guest"
                " wrote to",
            )
    return str(found["format"])


def _others_named(found: dict[str, Any]) -> Iterator[str]:
    """Files that an image names, by what qemu-img says of it: what it stands on, and where its data lies."""
    data = found.get("format-specific", {}).get("data", {})
    named = [found.get("backing-filename"), data.get("data-file")]
    named += [extent.get("filename") for extent in data.get("extents", ())]
    return (str(one) for one in named if one)


def import_image(source: str, target: str, image_format: str | None, on_progress: OnProgress) -> None:
    """Copy an image to a new file of a mount; its format is found out if it is None.

    What was begun is removed. Raises NotFoundError, ExistsError, MissingToolError, UnreadableError, UnsupportedError.
    """
    with _opened_image(source) as image:
        # What it stands on is found by its own path, if somebody says that it may stand on something.
        path = os.path.abspath(source) if image_format is not None else _opened_path(image.fileno())
        known = image_format or image_format_of(image, source)
        with _new_file(target, f"there is a volume {target} already", os.fstat(image.fileno())) as volume:
            if known == RAW:
                _import_raw(image, volume, on_progress)
            else:
                _import_by_qemu_img(path, known, volume, image)
            os.fsync(volume.fileno())


@contextmanager
def _opened_image(path: str) -> Iterator[IO[bytes]]:
    """An image to read. Raises NotFoundError, and UnsupportedError for what is neither a file nor a block device."""
    try:
        # One that is a pipe would be waited for.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise NotFoundError(f"there is no image {path}", "Give the path of one") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
        os.close(fd)
        raise UnsupportedError(f"{path} is neither a file nor a block device", "Give the path of an image")
    with os.fdopen(fd, "rb", buffering=0) as image:
        yield image


def _import_by_qemu_img(path: str, image_format: str, volume: IO[bytes], image: IO[bytes]) -> None:
    # By that format: of a fixed VHD the footer would count, if it were to be found out.
    given = (image.fileno(), volume.fileno())
    found = json.loads(_qemu_img("info", "-f", image_format, "--output", "json", "--", path, given=given))
    volume.truncate(found["virtual-size"])
    # Into the file that is there: with -n it makes none.
    words = ("-n", "-f", image_format, "-O", RAW, "--", path, _opened_path(volume.fileno()))
    _qemu_img("convert", *words, given=given)


def _import_raw(image: IO[bytes], volume: IO[bytes], on_progress: OnProgress) -> None:
    size_bytes = os.lseek(image.fileno(), 0, os.SEEK_END)
    volume.truncate(size_bytes)
    for at, data in _pieces(image, list(_data_extents(image.fileno(), size_bytes))):
        _write(volume, at, data)
        on_progress(at + len(data), size_bytes)


def _data_extents(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
            end = min(size_bytes, os.lseek(fd, start, os.SEEK_HOLE))
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            # A block device has no holes.
            start, end = position, size_bytes
        yield start, end - start
        position = end
