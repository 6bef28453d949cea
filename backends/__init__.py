"""Storage devices: where bytes lie.

A device is a flat store of named sparse files (:mod:`.base`). It knows nothing of volumes,
objects or snapshots, and imports nothing of snapfs. Errors are plain :class:`OSError`.
"""

from .base import ANYBODY, Buffer, Device, DeviceFile, LockHolder, Space
from .directory import DirectoryDevice, LocalImage, open_local_image
from .faulty import FailNth, FaultyDevice
from .memory import CrashPlan, MemoryDevice
from .readonly import AbsentDevice, ReadOnlyDevice
from .recording import CrashImages, Journal, PowerCut, RecordingDevice, distinct_cuts, power_cuts

__all__ = [
    "ANYBODY",
    "AbsentDevice",
    "Buffer",
    "CrashImages",
    "CrashPlan",
    "Device",
    "DeviceFile",
    "DirectoryDevice",
    "FailNth",
    "FaultyDevice",
    "Journal",
    "LocalImage",
    "LockHolder",
    "MemoryDevice",
    "PowerCut",
    "ReadOnlyDevice",
    "RecordingDevice",
    "Space",
    "distinct_cuts",
    "open_local_image",
    "power_cuts",
]
