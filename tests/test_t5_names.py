"""Names of snapshots that the kernel keeps in mind: what changes past it is told to it."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import subprocess
from pathlib import Path
from typing import ClassVar

import pytest

from .conftest import SNAPFS, Mounted, snapfs, traced, wait_until
from .unprivileged import run_unprivileged

pytestmark = pytest.mark.mount


def test_what_a_command_deletes_or_renames_is_gone_for_the_kernel_too(mounted_in_memory: Mounted) -> None:
    mounted = mounted_in_memory
    (mounted.path / "v").write_bytes(b"first")
    for name in ("a", "b", "c"):
        mounted.snapshot(name)
    inodes = {name: os.stat(mounted.snapshots / name).st_ino for name in ("a", "b", "c")}
    assert mounted.ask("delete a")["ok"]
    with pytest.raises(FileNotFoundError):
        os.stat(mounted.snapshots / "a")
    assert mounted.ask("rename b d")["ok"]
    with pytest.raises(FileNotFoundError):
        os.stat(mounted.snapshots / "b")
    assert os.stat(mounted.snapshots / "d").st_ino == inodes["b"]
    assert (mounted.snapshots / "d" / "v").read_bytes() == b"first"
    # The same name again is another snapshot, with what is in the volume now.
    (mounted.path / "v").write_bytes(b"second")
    assert mounted.ask("delete c")["ok"] and mounted.ask("snapshot c")["ok"]
    assert os.stat(mounted.snapshots / "c").st_ino != inodes["c"]
    assert (mounted.snapshots / "c" / "v").read_bytes() == b"second"
    os.rmdir(mounted.snapshots / "c")
    os.rename(mounted.snapshots / "d", mounted.snapshots / "e")
    assert os.listdir(mounted.snapshots) == ["e"]
    mounted.unmount()
    mounted.check()


def _requests_of_listing(mounted: Mounted) -> int:
    """How many requests `ls -l` of the snapshots reaches the daemon with."""
    told = mounted.pool.parent / "told"
    with traced(mounted, "writev", told):
        subprocess.run(["ls", "-l", mounted.snapshots], check=True, stdout=subprocess.DEVNULL)
    return told.read_text().count("writev(")


def test_a_listing_asks_for_many_snapshots_at_once(mounted_in_memory: Mounted) -> None:
    mounted = mounted_in_memory
    for number in range(200):
        mounted.snapshot(f"s{number}")
    mounted.remount()
    assert _requests_of_listing(mounted) < 50
    mounted.unmount()
    mounted.check()


class _FileHandle(ctypes.Structure):
    """See open_by_handle_at(2)."""

    _fields_: ClassVar = [("size_bytes", ctypes.c_uint), ("kind", ctypes.c_int), ("handle", ctypes.c_ubyte * 128)]


def test_a_file_is_found_by_its_handle_when_the_kernel_has_forgotten_it(mounted_in_memory: Mounted) -> None:
    mounted = mounted_in_memory
    (mounted.path / "v").write_bytes(b"monday")
    mounted.snapshot("one")
    (mounted.path / "v").write_bytes(b"tuesday")
    libc = ctypes.CDLL(None, use_errno=True)
    found = {}
    for path in ("v", ".snapshots", ".snapshots/one", ".snapshots/one/v", ".snapfs/events"):
        handle, mount_id = _FileHandle(128), ctypes.c_int()
        name = os.fsencode(mounted.path / path)
        assert libc.name_to_handle_at(-100, name, ctypes.byref(handle), ctypes.byref(mount_id), 0) == 0, path
        found[path] = handle
    mounted.remount()
    folder = os.open(mounted.path, os.O_RDONLY)
    try:
        contents = {}
        for path, handle in found.items():
            fd = libc.open_by_handle_at(folder, ctypes.byref(handle), os.O_RDONLY)
            assert fd >= 0, (path, os.strerror(ctypes.get_errno()))
            assert os.fstat(fd).st_ino == os.stat(mounted.path / path).st_ino
            contents[path] = os.read(fd, 100) if path.endswith("v") else b""
            os.close(fd)
    finally:
        os.close(folder)
    assert (contents["v"], contents[".snapshots/one/v"]) == (b"tuesday", b"monday")


def test_the_volumes_folder_keeps_what_it_is_given(mounted_in_memory: Mounted, tmp_path: Path) -> None:
    mounted = mounted_in_memory
    source = tmp_path / "source"
    source.mkdir()
    (source / "a").write_bytes(b"a")
    os.chown(source, 1234, 4321)
    os.chmod(source, 0o1751)
    os.utime(source, ns=(10**18 + 7, 15 * 10**17 + 7))
    expected = os.stat(source)
    subprocess.run(["cp", "-a", f"{source}/.", mounted.path], check=True)
    for is_again in (False, True):
        if is_again:
            mounted.remount()
        found = os.stat(mounted.path)
        assert (found.st_mode, found.st_uid, found.st_gid) == (expected.st_mode, 1234, 4321), is_again
        assert found.st_mtime_ns == expected.st_mtime_ns
    subprocess.run(["tar", "-C", source, "-cf", tmp_path / "tar", "."], check=True)
    subprocess.run(["tar", "-C", mounted.path, "-xpf", tmp_path / "tar"], check=True)
    os.chmod(mounted.path, 0)
    assert stat.S_IMODE(os.stat(mounted.path).st_mode) == 0o700, "the daemon comes to its volumes through it"
    os.chmod(mounted.path, 0o755)
    mounted.kill()
    mounted.mount()
    assert stat.S_IMODE(os.stat(mounted.path).st_mode) == 0o755
    for command in (["touch", "b"], ["mv", "b", "c"], ["rm", "c"]):
        os.utime(mounted.path, ns=(1, 1))
        subprocess.run(command, cwd=mounted.path, check=True)
        assert os.stat(mounted.path).st_mtime_ns > 10**18, command


def test_the_snapshots_folder_tells_when_its_names_changed(mounted_in_memory: Mounted) -> None:
    mounted = mounted_in_memory
    seen = [0]
    for command in ("snapshot a", "rename a b", "delete b"):
        assert mounted.ask(command)["ok"]
        wait_until(lambda: os.stat(mounted.snapshots).st_mtime_ns > seen[-1], "the kernel asks again")
        seen.append(os.stat(mounted.snapshots).st_mtime_ns)


def test_who_is_not_root_keeps_the_folder(tmp_path: Path) -> None:
    said = run_unprivileged(
        """
            os.mkdir("m")
            snapfs("init", "pool")
            snapfs("mount", "pool", "m")
            os.chown("m", os.getuid(), os.getgid())
            os.chmod("m", 0o750)
            snapfs("umount", "m")
            snapfs("mount", "pool", "m")
            print(oct(os.stat("m").st_mode), os.stat("m").st_uid == os.getuid())
            snapfs("umount", "m")
        """,
        tmp_path,
    )
    assert said.splitlines() == ["0o40750 True"]


def test_a_name_that_is_no_text_can_be_rolled_back_to(mounted_in_memory: Mounted) -> None:
    mounted = mounted_in_memory
    (mounted.path / "v").write_bytes(b"first")
    os.mkdir(os.fsencode(mounted.snapshots) + b"/caf\xe9")
    (mounted.path / "v").write_bytes(b"second")
    done = subprocess.run([*SNAPFS, "rollback", mounted.path, b"caf\xe9"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (mounted.path / "v").read_bytes() == b"first"
    (undo,) = [one for one in mounted.ask("list")["snapshots"] if one["name"].endswith("-before-rollback")]
    assert undo["note"] == "before the rollback to caf\\xe9"


def test_names_are_utf8_whatever_the_locale_takes_them_for(tmp_path: Path) -> None:
    locale = {"PATH": os.environ["PATH"], "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    pool, other, name = tmp_path / "p\u00e9", tmp_path / "other", "v\u00e9"

    def told(*words: object, given: bytes = b"") -> bytes:
        command: list[str | bytes] = [*SNAPFS, *(os.fsencode(str(word)) for word in words)]
        done = subprocess.run(command, env=locale, input=given, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    for where in (pool, other):
        told("init", where)
    (tmp_path / "mount").mkdir()
    told("mount", pool, tmp_path / "mount")
    try:
        told("create", tmp_path / "mount" / name, "--size", "4096")
        assert name in os.listdir(tmp_path / "mount")
        told("snapshot", tmp_path / "mount", "s\u00e9")
        (listed,) = json.loads(told("list", tmp_path / "mount", "--json"))
        assert listed["name"] == "s\u00e9"
        told("export", tmp_path / "mount" / ".snapshots" / "s\u00e9" / name, tmp_path / "image\u00e9")
        assert (tmp_path / "image\u00e9").read_bytes() == bytes(4096)
        stream = told("send", tmp_path / "mount", "s\u00e9")
    finally:
        snapfs("umount", tmp_path / "mount")
    assert told("receive", other, given=stream).decode().strip() == "s\u00e9"
