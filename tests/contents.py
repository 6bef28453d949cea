"""What a volume holds, of which most is zeros: compared thousands of times, and never laid out whole for that."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable

PAGE = 4096
SECTOR = 512
# Larger reads take memory that the kernel has to clear each time. No number of them ends where an object does.
_READ_BYTES = 75 * PAGE
_ZEROS = bytes(_READ_BYTES)


class Contents:
    """Bytes, kept as pages that are not of zeros alone, by their number; behind ``size_bytes`` they are zeros."""

    __slots__ = ("pages", "size_bytes")

    def __init__(self, data: bytes = b"") -> None:
        self.pages: dict[int, bytes] = {}
        self.size_bytes = 0
        self.write(0, data)

    def __len__(self) -> int:
        return self.size_bytes

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Contents) and self.size_bytes == other.size_bytes and self.pages == other.pages

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{self.size_bytes} bytes, pages {sorted(self.pages)[:20]}>"

    def copy(self) -> Contents:
        """The same, that stays when this one changes."""
        other = Contents()
        other.pages, other.size_bytes = dict(self.pages), self.size_bytes
        return other

    def page(self, number: int) -> bytes:
        """One page, filled up with zeros."""
        return self.pages.get(number, _ZEROS[:PAGE])

    def piece(self, start: int, length: int) -> bytes:
        """Some bytes, filled up with zeros."""
        first, last = start // PAGE, -(-(start + length) // PAGE)
        whole = b"".join(self.page(number) for number in range(first, last))
        return whole[start - first * PAGE : start - first * PAGE + length]

    def write(self, offset: int, data: bytes) -> None:
        """Have these bytes there; it grows as need be."""
        self.size_bytes = max(self.size_bytes, offset + len(data))
        at = 0
        while at < len(data):
            number, inside = divmod(offset + at, PAGE)
            step = min(PAGE - inside, len(data) - at)
            page = data[at : at + step]
            if step < PAGE:
                old = self.page(number)
                page = old[:inside] + page + old[inside + step :]
            self._put(number, page)
            at += step

    def _put(self, number: int, page: bytes) -> None:
        if page == _ZEROS[:PAGE]:
            self.pages.pop(number, None)
        else:
            self.pages[number] = page

    def clear(self, start: int, end: int) -> None:
        """Have zeros there; its size stays."""
        end = min(end, self.size_bytes)
        if end <= start:
            return
        for number in [one for one in self.pages if one * PAGE < end and (one + 1) * PAGE > start]:
            first, last = max(0, start - number * PAGE), min(PAGE, end - number * PAGE)
            old = self.pages[number]
            self._put(number, old[:first] + bytes(last - first) + old[last:])

    def grow(self, size_bytes: int) -> None:
        """Have at least this size."""
        self.size_bytes = max(self.size_bytes, size_bytes)

    def truncate(self, size_bytes: int) -> None:
        """Have exactly this size."""
        self.clear(size_bytes, self.size_bytes)
        self.size_bytes = size_bytes


async def contents_of(read: Callable[[int, int], Awaitable[bytearray]], size_bytes: int) -> Contents:
    """What a function reads, which takes an offset and a length."""
    found = Contents()
    for offset in range(0, size_bytes, _READ_BYTES):
        data = await read(offset, min(_READ_BYTES, size_bytes - offset))
        if data == _zeros_like(data):
            found.grow(offset + len(data))
        else:
            found.write(offset, bytes(data))
    return found


def _zeros_like(data: bytearray) -> bytes:
    return _ZEROS if len(data) == _READ_BYTES else bytes(len(data))


def first_of_no_version(found: Contents, versions: Iterable[Contents], *, exact_size: bool = True) -> str | None:
    """Where a sector is of none of the versions, in words.

    The kernel hands its pages over in pieces, between which a file has a size of its own: then not ``exact_size``.
    """
    versions = list(versions)
    sizes = {len(version) for version in versions}
    if len(found) not in sizes if exact_size else not min(sizes) <= len(found) <= max(sizes):
        return f"{len(found)} bytes, which no version has"
    for number in sorted(found.pages.keys() | set().union(*(version.pages for version in versions))):
        page = found.page(number)
        if page == versions[-1].page(number):
            continue
        for start in range(0, min(PAGE, len(found) - number * PAGE), SECTOR):
            end = min(start + SECTOR, len(found) - number * PAGE)
            if all(page[start:end] != version.page(number)[start:end] for version in versions):
                return f"what lies at {number * PAGE + start} is of no version"
    return None
