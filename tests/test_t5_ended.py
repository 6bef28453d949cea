"""Commands that are ended halfway, or run in odd places: nothing half made is left, and nothing of the place is run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import SNAPFS, Mounted, clear_away, run, snapfs, wait_until

MIB = 1 << 20


@contextlib.contextmanager
def a_pool(tmp_path: Path) -> Iterator[Mounted]:
    """One that is not mounted; what a test leaves mounted is cleared away, and the pool verified."""
    folder = tmp_path / "own"
    folder.mkdir()
    mounted = Mounted(folder)
    try:
        mounted.unmount()
        yield mounted
        mounted.check()
    finally:
        clear_away(mounted)


def in_foreground(mounted: Mounted) -> subprocess.Popen[str]:
    """A daemon, at the very moment at which there is a mount, and nothing else is yet."""
    command = [*SNAPFS, "mount", "--foreground", str(mounted.pool), str(mounted.path)]
    daemon = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: is_mounted(mounted), "there is a mount")
    return daemon


def is_mounted(mounted: Mounted) -> bool:
    return f" {mounted.path} " in Path("/proc/mounts").read_text()


@pytest.mark.mount
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_import_that_is_told_to_end_leaves_no_volume(
    mounted: Mounted, tmp_path: Path, number: signal.Signals
) -> None:
    image = tmp_path / "image"
    # Many pieces of data between holes take long.
    with open(image, "wb") as file:
        for place in range(0, 1024 * MIB, MIB):
            os.pwrite(file.fileno(), os.urandom(4096), place)
    # Whoever started the tests, in the background say, may have had the signal ignored.
    heeding = ["env", f"--default-signal={number.name[3:]}"]
    importing = subprocess.Popen(
        [*heeding, *SNAPFS, "import", "--format", "raw", str(image), str(mounted.path / "v")], stderr=subprocess.PIPE
    )
    wait_until(lambda: (mounted.path / "v").exists(), "it has begun")
    importing.send_signal(number)
    _, said = importing.communicate(timeout=60)
    assert importing.returncode != 0 and b"Traceback" not in said
    assert not (mounted.path / "v").exists()


@pytest.mark.mount
def test_nothing_that_lies_in_the_current_folder_is_run(mounted: Mounted, tmp_path: Path) -> None:
    """A module of its own name in place of one of Python's, or of a library's."""
    mounted.unmount()
    trap, sprung = tmp_path / "trap", tmp_path / "sprung"
    trap.mkdir()
    for name in ("click", "json", "trio", "logging", "subprocess", "snapfs"):
        (trap / f"{name}.py").write_text(f"open({str(sprung)!r}, 'w').close()\nraise SystemExit('trapped')\n")
    command = [str(Path(sys.executable).with_name("snapfs")), "receive", "--tokens", str(mounted.pool)]
    if not os.path.exists(command[0]):
        command[:1] = [sys.executable, "-P", "-m", "snapfs"]
    done = subprocess.run(command, cwd=trap, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not sprung.exists()


@pytest.mark.mount
def test_a_mount_whose_command_was_killed_is_there(tmp_path: Path) -> None:
    with a_pool(tmp_path) as mounted:
        command = subprocess.Popen([*SNAPFS, "mount", mounted.pool, mounted.path], stderr=subprocess.DEVNULL)
        children = Path(f"/proc/{command.pid}/task/{command.pid}/children")
        wait_until(lambda: bool(children.read_text().split()), "the daemon is started")
        command.kill()
        command.wait()
        wait_until(lambda: is_mounted(mounted), "it is mounted")
        wait_until(lambda: (mounted.path / ".snapfs" / "status.json").exists(), "it answers")
        (mounted.path / "v").write_bytes(b"1")
        mounted.unmount()
        log = (mounted.pool / "daemon.log").read_text()
        assert "unforeseen" not in log and "Traceback" not in log


@pytest.mark.mount
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_mount_that_is_ended_while_it_begins_is_not_left_behind(tmp_path: Path, number: signal.Signals) -> None:
    with a_pool(tmp_path) as mounted:
        for _ in range(4):
            daemon = in_foreground(mounted)
            daemon.send_signal(number)
            _, said = daemon.communicate(timeout=60)
            assert "Traceback" not in said and not is_mounted(mounted)


@pytest.mark.mount
def test_a_mount_that_is_unmounted_before_it_answered_ends_in_order(tmp_path: Path) -> None:
    with a_pool(tmp_path) as mounted:
        for _ in range(4):
            daemon = in_foreground(mounted)
            run("umount", "--lazy", mounted.path)
            _, said = daemon.communicate(timeout=60)
            assert "Traceback" not in said


@pytest.mark.mount
def test_paths_that_are_no_text_are_refused_in_words(mounted: Mounted, tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    os.mkdir(odd)
    empty = tmp_path / "empty"
    empty.mkdir()
    (Path(odd) / "image").write_bytes(bytes(4096))
    for words in (
        ("init", f"{odd}/pool"),
        ("init", tmp_path / "pool", "--device", odd),
        ("mount", odd, empty),
        ("check", odd),
        ("create", mounted.path / "v", "--source", f"{odd}/image"),
        ("changelog", "create", mounted.path, "logs", "--device", odd, "--capacity", "1M"),
    ):
        assert "is not text in UTF-8" in snapfs(*words, expect=1).stderr
    assert os.listdir(odd) == ["image"] and not (tmp_path / "pool").exists()


@pytest.mark.mount
def test_a_pool_on_a_disk_that_takes_no_writes_is_checked(tmp_path: Path) -> None:
    image, disk = tmp_path / "image", tmp_path / "disk"
    disk.mkdir()
    run("truncate", "-s", "64M", image)
    run("mkfs.ext4", "-q", image)
    run("mount", "-o", "loop", image, disk)
    try:
        snapfs("init", disk / "pool")
        run("mount", "-o", "remount,ro", disk)
        assert "clean" in snapfs("check", disk / "pool").stdout
        (tmp_path / "mount").mkdir()
        said = snapfs("mount", disk / "pool", tmp_path / "mount", expect=1).stderr
        assert "takes no writes" in said and "rescue" in said
    finally:
        run("umount", disk)


@pytest.mark.mount
def test_names_tell_a_terminal_nothing_wherever_they_are_printed(mounted: Mounted) -> None:
    name = "v\x9b31m"
    (mounted.path / name).write_bytes(b"1")
    mounted.snapshot(f"s{name}")
    (mounted.path / name).write_bytes(b"2" * 4096)
    snapfs("create", mounted.path / f"cow{name}", "--mode", "cow", "--size", "4K")
    mounted.snapshot("t")
    wait_until(lambda: not mounted.status()["unsealed_snapshot_count"], "all is sealed")
    for words in (
        ("diff", mounted.path, f"s{name}"),
        ("delete", mounted.path, f"s{name}", "--dry-run"),
        ("verify", mounted.path, "t"),
        ("list", mounted.path),
    ):
        shown = snapfs(*words).stdout
        assert "\x9b" not in shown and "\\x9b31m" in shown, words
    said = snapfs("delete", mounted.path, f"not{name}", expect=1).stderr
    assert "\x9b" not in said and "\\x9b31m" in said
    # A name alone is for a script, which is to find what it names.
    assert json.loads(snapfs("list", mounted.path, "--json").stdout)[0]["name"] == f"s{name}"


@pytest.mark.mount
def test_a_guard_that_is_killed_by_what_it_started_leaves_nothing_frozen(mounted: Mounted, tmp_path: Path) -> None:
    frozen = tmp_path / "frozen"
    (mounted.path / "v").write_bytes(b"1")
    before, after = f": > {frozen}; kill -9 $PPID; sleep 0.2", f"rm -f {frozen}"
    snapfs("hook", "add", mounted.path, "h", "--shell", "--before", before, "--after", after)
    for number in range(6):
        with contextlib.suppress(AssertionError):
            snapfs("snapshot", mounted.path, f"s{number}")
        wait_until(lambda: not frozen.exists(), "it is thawed")
    assert "hook-guard-lost" in (mounted.path / ".snapfs" / "events").read_text()


@pytest.mark.mount
def test_what_a_hook_would_run_is_not_for_everyone(mounted: Mounted) -> None:
    (mounted.path / "v").write_bytes(b"1")
    snapfs("hook", "add", mounted.path, "h", "--after", "/root/secret-folder/thaw")
    snapfs("snapshot", mounted.path)
    told = (mounted.path / ".snapfs" / "events").read_text()
    assert "after cannot be run: No such file or directory" in told and "secret-folder" not in told
    assert "secret-folder" in (mounted.pool / "daemon.log").read_text()


@pytest.mark.parametrize("subformat", ["fixed", "dynamic"])
@pytest.mark.mount
def test_a_vhd_has_its_own_size_in_and_out(mounted: Mounted, tmp_path: Path, subformat: str) -> None:
    raw, image, out = tmp_path / "raw", tmp_path / "image.vhd", tmp_path / "out.vhd"
    raw.write_bytes(os.urandom(4 * MIB))
    options = ["-o", f"subformat={subformat},force_size=on"]
    run("qemu-img", "convert", "-f", "raw", "-O", "vpc", *options, raw, image)
    snapfs("import", "--format", "vpc", image, mounted.path / "v")
    assert (mounted.path / "v").read_bytes() == raw.read_bytes()
    snapfs("export", "--format", "vpc", mounted.path / "v", out)
    assert json.loads(run("qemu-img", "info", "-f", "vpc", "--output", "json", out).stdout)["virtual-size"] == 4 * MIB
    assert "there is no volume" in snapfs("export", mounted.path / ".snapfs" / "status.json", raw, expect=1).stderr
