"""Commands about volumes."""

from __future__ import annotations

import os
from collections.abc import Mapping

from ..errors import BadCommandError, ChangedTargetError, TooLargeError
from ..formats import CHANGE_MODES
from ..geometry import volume_size_bytes_max
from ..making import VolumeWish
from ..units import format_size, parse_size, show_name
from . import names
from .command import Answer, Command, CommandContext, CommandFunction
from .snapshotcommands import snapshot_of


async def _create(context: CommandContext, command: Command) -> Answer:
    """create VOLUME [size=SIZE] [mode=redirect|cow] [source=PATH] [change-log=NAME]: make a volume."""
    command.word_count(1, 1, "the name of a volume")
    command.known_options("size", "mode", "source", "change-log")
    if command.one_of("source"):
        context.for_owner("adopting an image")
    size, mode = command.one_of("size"), command.one_of("mode") or "redirect"
    if mode not in CHANGE_MODES:
        raise BadCommandError(f"there is no mode {mode!r}", f"Modes: {', '.join(CHANGE_MODES)}")
    size_bytes = None if size is None else parse_size(size)
    _check_size(context, size_bytes or 0)
    wish = VolumeWish(
        command.words[0],
        size_bytes,
        CHANGE_MODES[mode],
        command.one_of("source") or "",
        (command.one_of("change-log") or "").encode("utf-8", "surrogateescape"),
        uid=os.getuid(),
        gid=os.getgid(),
    )
    volume = await context.pool.maker.create(wish)
    return {"volume": show_name(wish.name), "volume_id": volume.volume_id, "size_bytes": volume.size_bytes}


async def _resize(context: CommandContext, command: Command) -> Answer:
    """resize VOLUME SIZE: set a volume's size; what is gained reads as zeros."""
    command.word_count(2, 2, "a volume and a size")
    command.known_options()
    name, size = command.words
    volume = context.pool.volumes.get(name)
    size_bytes = parse_size(show_name(size))
    _check_size(context, size_bytes)
    await context.resize_file(name, size_bytes)
    await volume.sync()
    return {"volume": show_name(name), "size_bytes": size_bytes}


def _check_size(context: CommandContext, size_bytes: int) -> None:
    size_bytes_max = volume_size_bytes_max(len(context.pool.processors))
    if size_bytes > size_bytes_max:
        raise TooLargeError(f"volumes of this pool go up to {format_size(size_bytes_max)}", "Give a smaller size")


async def _discard(context: CommandContext, command: Command) -> Answer:
    """discard VOLUME OFFSET LENGTH [sync=no] [inode=N]: a range is to read as zeros; its whole blocks take no space.

    With sync=no it is durable with the volume's next sync. With inode=N only if the volume is that one.
    """
    command.word_count(3, 3, "a volume, an offset and a length")
    command.known_options("sync", "inode")
    offset, length = (parse_size(show_name(word)) for word in command.words[1:])
    volume = context.pool.volumes.get(command.words[0])
    if command.one_of("inode") not in (None, str(names.of_volume(volume.file_id))):
        raise ChangedTargetError(f"volume {show_name(command.words[0])!r} is another by now", "Nothing was discarded")
    await context.pool.snapshots.before_cut([volume])
    try:
        freed_bytes = await context.pool.volumes.discard(volume, offset, length)
    finally:
        # Also when it stopped halfway.
        await context.forget_pages(volume, offset, length)
    if command.flag("sync", default=True):
        await volume.sync()
    return {"volume": show_name(command.words[0]), "freed_bytes": freed_bytes}


async def _clone(context: CommandContext, command: Command) -> Answer:
    """clone NAME/VOLUME NEW: make a writable volume of what a snapshot holds."""
    command.word_count(2, 2, "NAME/VOLUME and the name of the new volume")
    command.known_options()
    source, new = command.words
    snapshot, slash, volume = source.partition(b"/")
    if not slash:
        raise BadCommandError(f"{show_name(source)!r} names no volume of a snapshot", "Write it as NAME/VOLUME")
    made = await context.pool.clones.clone(snapshot_of(context.pool, snapshot).name or b"", volume, new)
    return {"volume": show_name(new), "volume_id": made.volume_id, "size_bytes": made.size_bytes}


async def _flatten(context: CommandContext, command: Command) -> Answer:
    """flatten VOLUME [job=NAME]: copy what a clone shares with others, so that it depends on none."""
    command.word_count(1, 1, "the name of a volume")
    command.known_options("job")
    copied_bytes = await context.pool.clones.flatten(command.words[0], command.one_of("job") or "")
    return {"volume": show_name(command.words[0]), "copied_bytes": copied_bytes}


async def _rollback(context: CommandContext, command: Command) -> Answer:
    """rollback NAME [volume=V]... [force=yes]: put volumes back to a snapshot; the present is kept as another one."""
    command.word_count(1, 1, "the name of a snapshot")
    command.known_options("volume", "force")
    if command.flag("force"):
        # Whoever has a volume open may then read what its mode, which comes back as well, forbids.
        context.for_owner("forcing a rollback")
    name = snapshot_of(context.pool, command.words[0]).name or b""
    done = await context.pool.clones.rollback(name, command.all_of("volume") or None, force=command.flag("force"))
    volumes = [show_name(one) for one in done.names]
    return {"name": show_name(name), "undo": show_name(done.undo.name or b""), "volumes": volumes}


COMMANDS: Mapping[str, CommandFunction] = {
    "create": _create,
    "resize": _resize,
    "discard": _discard,
    "clone": _clone,
    "flatten": _flatten,
    "rollback": _rollback,
}
