"""Memory in huge pages: what is allocated in between, only that, unchanged, and nothing where nobody wants any."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from prefixkit.serving import huge_pages
from prefixkit.serving.huge_pages import in_huge_pages
from prefixkit.serving.prefix_table import Array

SIZE = 2 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")


def system(folder: Path, enabled: str) -> Path:
    """What Linux says of huge pages, as a folder."""
    (folder / "enabled").write_text(enabled)
    (folder / "hpage_pmd_size").write_text(f"{SIZE}\n")
    return folder


def filled(pages: int = 8) -> Array:
    """Memory in pages of the usual size: numpy asks for huge ones by itself."""
    array = np.frombuffer(mmap.mmap(-1, pages * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    array[:] = np.arange(len(array), dtype=np.uint8)
    return array


def shared(ranges: list[tuple[int, int]], array: Array) -> int:
    """Bytes of `array` that lie in `ranges`."""
    begin = array.ctypes.data
    return sum(max(0, min(end, begin + array.nbytes) - max(first, begin)) for first, end in ranges)


def finish() -> None:
    """Wait until all is put together."""
    for thread in threading.enumerate():
        if thread.name == huge_pages.THREAD:
            thread.join()


def huge() -> int:
    """KiB of this process that lie in huge pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))


@pytest.fixture
def collapsed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The ranges that are put together from now on; none of them is."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(huge_pages, "_collapse", found.extend)
    return found


def test_what_is_allocated_in_between_is_put_together(
    collapsed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huge_pages, "_SYSTEM", system(tmp_path, "always [madvise] never"))
    before = filled()
    with in_huge_pages():
        between = filled()
    finish()
    assert shared(collapsed, between) >= between.nbytes - 2 * SIZE
    assert shared(collapsed, before) == 0
    assert all(edge % SIZE == 0 for range_ in collapsed for edge in range_)


@pytest.mark.parametrize("enabled", ["always madvise [never]", ""])
def test_nothing_is_done_where_there_are_none(
    enabled: str, collapsed: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    there = system(tmp_path, enabled) if enabled else tmp_path / "nothing"
    monkeypatch.setattr(huge_pages, "_SYSTEM", there)
    with in_huge_pages():
        kept = filled()
    finish()
    assert not collapsed
    assert kept.any()


def test_numbers_stay_what_they_are() -> None:
    before = huge()
    with in_huge_pages():
        array = filled()
    finish()
    after = huge()
    assert (array == np.arange(len(array), dtype=np.uint8)).all()
    other = filled()
    inside = (other.ctypes.data + SIZE - 1) & -SIZE
    if not huge_pages._size() or ctypes.CDLL(None).madvise(ctypes.c_void_p(inside), ctypes.c_size_t(SIZE), 25):
        pytest.skip("this system puts no pages together")
    assert after >= before + 6 * SIZE // 1024
