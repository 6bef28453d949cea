"""Power cuts at every call that reaches a device. ``contrib/soak power`` goes on with other seeds."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from snapfs.backends import CrashImages, Journal, PowerCut, RecordingDevice, power_cuts
from snapfs.backends.conformance import check_device

from .powercut import Recording, judge, record, try_power_cuts

PARTS = 4
LENGTH = 17


def test_a_device_that_is_recorded_is_a_device() -> None:
    check_device(lambda: RecordingDevice(Journal(), "x"))


def test_what_was_synced_is_in_every_image_and_of_the_rest_any_part() -> None:
    journal = Journal()
    device = RecordingDevice(journal, "x")
    file = device.create("f")
    file.write(b"a" * 8192, 0)
    file.sync()
    device.sync_names("")
    start = len(journal.operations)
    file.write(b"b" * 4096, 0)
    file.write(b"c" * 4096, 4096)
    device.create("g").write(b"g", 0)
    images = CrashImages(journal, start)
    found: dict[tuple[bytes, bytes], set[bool]] = {}
    for cut in power_cuts(journal, len(journal.operations), 1):
        after = images.after(cut)["x"]
        contents = after.read_file("f")
        found.setdefault((contents[:1], contents[-1:]), set()).add("g" in after.names(""))
    # Each of both writes alone, both, none; the new name with and without.
    assert set(found) >= {(first, last) for first in (b"a", b"b") for last in (b"a", b"c")}
    assert {True, False} in found.values()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_power_cut_leaves_what_the_model_allows(seed: int, part: int) -> None:
    # Cuts that leave the same count once: some 11,000 images.
    assert try_power_cuts(seed, LENGTH, (part, PARTS)) > 700


def test_a_sync_that_is_missing_is_found() -> None:
    clock = trio.testing.MockClock()
    operations = [("create", b"a"), ("write", b"a", 0, 9000, 1), ("sync", b"a")]
    recording: Recording = trio.run(record, operations, clock, clock=clock)
    without = Journal(capacities=recording.journal.capacities)
    logs = {
        (one.device, one.file)
        for one in recording.journal.operations
        if one.kind == "create" and one.name.startswith("logs/")
    }
    assert logs
    for one in recording.journal.operations:
        if one.kind != "sync" or (one.device, one.file) not in logs:
            without.note(one)
    cut = PowerCut(len(without.operations), frozenset())
    with pytest.raises(AssertionError, match="that maps name"):
        trio.run(judge, recording.marks[-1], CrashImages(without).after(cut), clock=clock)
