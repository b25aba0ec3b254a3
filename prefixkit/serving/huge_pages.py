"""Huge pages for the weights that a graph reads at every pass, where Linux has them for those who ask.

A token reads each weight once. In pages of 4 KiB the processor must look up where every one of them lies, in a virtual
machine twice over, and prefetching ends at each border. Many systems give huge pages only where a program asks for
them, which onnxruntime's allocator does not.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

_SYSTEM = Path("/sys/kernel/mm/transparent_hugepage")
_MAPS = Path("/proc/self/maps")
_COLLAPSE = 25
"""MADV_COLLAPSE, of Linux 6.1 and later: put these pages together now."""
_AT_ONCE = 64 << 20
"""Bytes: a process that ends waits for so many."""
THREAD = "prefixkit-huge-pages"

_Range = tuple[int, int]


@contextmanager
def in_huge_pages() -> Iterator[None]:
    """Put together what is allocated meanwhile, and filled. Where the system has no such pages nothing happens.

    It takes up to a second for 400 MB, and so is done beside what follows, which may use the memory.
    """
    size = _size()
    before = _anonymous() if size else []
    yield
    if size:
        new = [(-(-begin // size) * size, end // size * size) for begin, end in _without(_anonymous(), before)]
        Thread(target=_collapse, args=(new,), name=THREAD, daemon=True).start()


def _size() -> int:
    """Bytes of a huge page; 0 where there are none, or whoever runs the system wants none."""
    try:
        wanted = "[never]" not in (_SYSTEM / "enabled").read_text()
        return int((_SYSTEM / "hpage_pmd_size").read_text()) if wanted else 0
    except (OSError, ValueError):
        return 0


def _anonymous() -> list[_Range]:
    """Where this process has memory of no file that it may write to."""
    found = []
    for line in _MAPS.read_text().splitlines():
        where, rights, _, _, inode, *name = line.split(maxsplit=5)
        if rights == "rw-p" and inode == "0" and name in ([], ["[heap]"]):
            begin, end = where.split("-")
            found.append((int(begin, 16), int(end, 16)))
    return found


def _without(ranges: list[_Range], others: list[_Range]) -> Iterator[_Range]:
    """What of `ranges` is in none of `others`: neighbours become one range."""
    for begin, end in ranges:
        for other, its_end in others:
            if other < end and its_end > begin:
                yield begin, other
                begin = its_end
        yield begin, end


def _collapse(ranges: list[_Range]) -> None:
    advise = ctypes.CDLL(None).madvise
    for first, last in ranges:
        for begin in range(first, last, _AT_ONCE):
            size = min(_AT_ONCE, last - begin)
            # Refused by older systems, and where memory is in too small pieces: then it stays as it is.
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(size), _COLLAPSE)
