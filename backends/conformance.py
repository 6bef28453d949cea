"""The conformance kit: what every device must do, as code that any device can be run through.

``check_device`` takes a function that makes an empty device. It raises AssertionError with
words at the first thing that is not so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from .base import Device, LockHolder

PAGE_SIZE = 4096


def check_device(make: Callable[[], Device]) -> None:
    """Run every check on fresh devices."""
    for check in (
        _files_read_back,
        _holes_read_as_zeros,
        _punched_ranges_are_freed,
        _names_come_and_go,
        _whole_files_are_replaced,
        _missing_files_are_said_to_be_missing,
        _space_is_told,
    ):
        device = make()
        try:
            check(device)
        finally:
            device.close()


def check_lock(make: Callable[[], Device]) -> None:
    """Of two users of the same store only one gets the lock. ``make`` opens the same store twice."""
    first, second = make(), make()
    try:
        first.lock("lock", "the first")
        try:
            second.lock("lock", "the second")
        except LockHolder as busy:
            _expect(busy.holder == "the first", "the second is told who holds the lock")
        else:
            _expect(False, "the second is kept out")
    finally:
        first.close()
    second.lock("lock", "the second")
    second.close()
    first, second = make(), make()
    names = set(first.names(""))
    first.claim()
    try:
        second.claim()
    except LockHolder:
        _expect(set(first.names("")) == names, "nothing is written to claim a device")
    else:
        _expect(False, "the second is kept out of what is claimed")
    first.close()
    second.claim()
    second.close()


def _expect(fact: bool, words: str) -> None:
    if not fact:
        raise AssertionError(f"device: not so: {words}")


def _files_read_back(device: Device) -> None:
    file = device.create("logs/0/a")
    file.write(b"0123456789", 5000)
    file.write(memoryview(b"AB"), 5003)
    large = bytes(range(256)) * 2000
    file.write_new(large, 1 << 20)
    found = bytearray(len(large))
    _expect(file.read_into(found, 1 << 20) == len(large) and found == large, "a large new write is whole")
    file.truncate(5010)
    buffer = bytearray(10)
    _expect(file.read_into(buffer, 5000) == 10, "a read is as long as the data")
    _expect(buffer == b"012AB56789", "the later write wins")
    _expect(file.size() == 5010, "the size is the end of the last write")
    _expect(file.read_into(bytearray(10), 5005) == 5, "a read is short at the end")
    _expect(file.read_into(bytearray(10), 9000) == 0, "a read behind the end is empty")
    file.begin_writeback()
    _expect(file.read_into(buffer, 5000) == 10 and buffer == b"012AB56789", "to begin to write changes nothing")
    file.sync()
    file.close()
    file.close()
    again = device.open("logs/0/a")
    with contextlib.suppress(BlockingIOError):
        _expect(again.try_read_into(buffer, 5000) == 10, "a read that does not wait is whole")
    _expect(again.read_into(buffer, 5000) == 10 and buffer == b"012AB56789", "another handle reads it too")
    again.close()


def _holes_read_as_zeros(device: Device) -> None:
    file = device.create("sparse")
    file.write(b"x" * PAGE_SIZE, 1 << 32)
    buffer = bytearray(b"y" * 100)
    _expect(file.read_into(buffer, 12345) == 100 and not any(buffer), "a hole reads as zeros")
    _expect(file.allocated() < 1 << 20, "a hole takes no room")
    _expect(file.data_extents() == [(1 << 32, (1 << 32) + PAGE_SIZE)], "extents leave holes out")
    file.truncate(10)
    _expect(file.size() == 10 and not file.data_extents()[1:], "truncate cuts")
    file.close()


def _punched_ranges_are_freed(device: Device) -> None:
    file = device.create("punched")
    file.write(b"z" * PAGE_SIZE * 64, 0)
    file.sync()
    before = file.allocated()
    file.punch(PAGE_SIZE, PAGE_SIZE * 62)
    buffer = bytearray(PAGE_SIZE)
    _expect(file.read_into(buffer, PAGE_SIZE * 5) == PAGE_SIZE and not any(buffer), "punched reads zeros")
    _expect(file.read_into(buffer, 0) == PAGE_SIZE and set(buffer) == {ord("z")}, "the rest stays")
    _expect(file.size() == PAGE_SIZE * 64, "the size stays")
    _expect(file.allocated() < before, "the room is given back")
    file.close()


def _names_come_and_go(device: Device) -> None:
    for name in ("d/one", "d/two", "e/three"):
        device.create(name).close()
    device.sync_names("d")
    _expect(sorted(device.names("d")) == ["one", "two"], "a folder lists its own files")
    device.rename("d/one", "d/two")
    _expect(device.names("d") == ["two"], "a rename replaces")
    device.remove("d/two")
    device.sync_names("d")
    _expect(device.names("d") == [] and device.names("nowhere") == [], "an empty folder lists nothing")


def _whole_files_are_replaced(device: Device) -> None:
    device.write_file("descriptor", b"old and long")
    device.write_file("descriptor", b"new")
    _expect(device.read_file("descriptor") == b"new", "the new contents replace the old")


def _missing_files_are_said_to_be_missing(device: Device) -> None:
    for call in (device.open, device.remove, device.read_file):
        try:
            call("nothing")
        except FileNotFoundError:
            continue
        _expect(False, "a missing file is FileNotFoundError")


def _space_is_told(device: Device) -> None:
    space = device.space()
    _expect(0 < space.free_bytes <= space.total_bytes, "free space is within the total")
