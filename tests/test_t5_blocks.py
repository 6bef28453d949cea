"""The blocks that stat tells: GNU tar does not read a file without any when it looks for holes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from .conftest import Mounted, snapfs

pytestmark = pytest.mark.mount
MIB = 1 << 20


def archived(path: Path) -> bytes:
    """A file's contents by way of a sparse archive."""
    made = subprocess.run(["tar", "-cSf", "-", path.name], cwd=path.parent, capture_output=True, check=True)
    return subprocess.run(["tar", "-xOf", "-"], input=made.stdout, capture_output=True, check=True).stdout


def test_what_a_sparse_archive_has_is_what_the_files_hold(mounted: Mounted, tmp_path: Path) -> None:
    old, new = os.urandom(MIB), os.urandom(MIB)
    snapfs("create", mounted.path / "cow", "--mode", "cow", "--size", MIB)
    snapfs("create", mounted.path / "empty-cow", "--mode", "cow", "--size", MIB)
    image = tmp_path / "image"
    image.write_bytes(old)
    snapfs("create", mounted.path / "adopted", "--mode", "cow", "--source", image)
    for name in ("cow", "plain"):
        (mounted.path / name).write_bytes(old)
    with open(mounted.path / "holes", "wb") as file:
        file.truncate(MIB)
    held = mounted.snapshot("s")
    for name in ("cow", "adopted"):
        assert mounted.ask(f"clone s/{name} clone-of-{name}")["ok"]
        with open(mounted.path / name, "r+b") as file:
            file.write(new)
    expected = {
        mounted.path / "cow": new,
        mounted.path / "adopted": new,
        mounted.path / "plain": old,
        mounted.path / "holes": bytes(MIB),
        mounted.path / "empty-cow": bytes(MIB),
        mounted.path / "clone-of-cow": old,
        mounted.path / "clone-of-adopted": old,
        held / "cow": old,
        held / "adopted": old,
        held / "plain": old,
        held / "holes": bytes(MIB),
    }
    for path, contents in expected.items():
        assert archived(path) == contents, path
    # What is all hole is told as such.
    assert (mounted.path / "holes").stat().st_blocks == (held / "holes").stat().st_blocks == 0
    mounted.remount()
    with open(held / "plain", "rb"):
        # It is asked for anew, while somebody has it open.
        assert (held / "plain").stat().st_blocks == MIB // 512
        assert archived(held / "plain") == old
