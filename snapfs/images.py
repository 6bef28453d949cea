"""Copying volumes out to disk images and images in, through mounts; qemu-img does what is not raw."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import IO

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
OnProgress = Callable[[int, int], None]
Extents = list[tuple[int, int]]


def _opened_path(file: IO[bytes]) -> str:
    """A path to a file that is open, whatever has its name by now; for this process and those that are given it."""
    return f"/proc/self/fd/{file.fileno()}"


def _qemu_img(*words: str, file: IO[bytes] | None = None) -> str:
    """Run qemu-img, which is handed ``file``; its words. Raises MissingToolError, UnreadableError with them."""
    tool = shutil.which("qemu-img")
    if tool is None:
        raise MissingToolError("qemu-img is not installed", "Install qemu-utils, or use the format raw")
    given = [] if file is None else [file.fileno()]
    done = subprocess.run([tool, *words], capture_output=True, text=True, check=False, pass_fds=given)
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
            options = [word for one in _EXACT.get(image_format, ()) for word in ("-o", one)]
            _qemu_img(
                "convert", "-f", RAW, "-O", image_format, *options, "--", _opened_path(source), target, file=source
            )


@contextmanager
def _new_file(path: str, reason: str, like: os.stat_result) -> Iterator[IO[bytes]]:
    """A new file, for those to read who may read what it is ``like``; removed again if what is done with it fails.

    Raises ExistsError with ``reason`` when there is one.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, like.st_mode & 0o666 | 0o600)
    except FileExistsError:
        raise ExistsError(reason, "Choose another name") from None
    with os.fdopen(fd, "r+b", buffering=0) as file:
        try:
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
        _write(image, at, data)
        done += len(data)
        on_progress(done, total)
    image.truncate(os.fstat(volume.fileno()).st_size)
    os.fsync(image.fileno())


def _pieces(file: IO[bytes], extents: Extents) -> Iterator[tuple[int, bytes]]:
    for offset, length in extents:
        done = 0
        while done < length:
            data = os.pread(file.fileno(), min(_PIECE_BYTES, length - done), offset + done)
            if not data:
                raise UnreadableError("the file is shorter than it should be", "Check it, then try again")
            yield offset + done, data
            done += len(data)


def _write(file: IO[bytes], offset: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(file.fileno(), view, offset)
        view, offset = view[count:], offset + count


def image_format_of(path: str) -> str:
    """What kind of image a file is.

    Raises NotFoundError; MissingToolError when it is one that qemu-img must read; UnsupportedError when it stands on
    another file: a guest can write to its raw disk what makes it look so, and have any file of the host read.
    """
    if not os.path.exists(path):
        raise NotFoundError(f"there is no image {path}", "Give the path of one")
    if shutil.which("qemu-img") is None:
        with open(path, "rb", buffering=0) as file:
            head = os.pread(file.fileno(), 512, 0)
        for offset, magic, kind in _MAGICS:
            if head.startswith(magic, offset):
                raise MissingToolError(
                    f"{path} looks like {kind}, and qemu-img is not installed",
                    "Install qemu-utils; or say --format raw, if it is to be copied as it is",
                )
        return RAW
    found = json.loads(_qemu_img("info", "--output", "json", "--", path))
    data_file = found.get("format-specific", {}).get("data", {}).get("data-file")
    other = found.get("backing-filename") or data_file
    if other:
        raise UnsupportedError(
            f"{path} looks like {found['format']} and says that it stands on {other}",
            f"Say --format {found['format']}, if you know that; or --format raw, if it is a disk that a guest wrote to",
        )
    return str(found["format"])


def import_image(source: str, target: str, image_format: str, on_progress: OnProgress) -> None:
    """Copy an image to a new file of a mount. Raises as :func:`export_image`; what was begun is removed."""
    with _new_file(target, f"there is a volume {target} already", os.stat(source)) as volume:
        if image_format == RAW:
            _import_raw(source, volume, on_progress)
        else:
            # By that format: of a fixed VHD the footer would count, if it were to be found out.
            found = json.loads(_qemu_img("info", "-f", image_format, "--output", "json", "--", source))
            volume.truncate(found["virtual-size"])
            # Into the file that is there: with -n it makes none.
            _qemu_img("convert", "-n", "-f", image_format, "-O", RAW, "--", source, _opened_path(volume), file=volume)
        os.fsync(volume.fileno())


def _import_raw(source: str, volume: IO[bytes], on_progress: OnProgress) -> None:
    with open(source, "rb", buffering=0) as image:
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
