"""A frozen weight in the order in which oneDNN multiplies by it, beside the one in which it lies.

A product otherwise puts it into that order anew each time. The two ways, through a layer and back, want an order each,
and each is as large as the weight; the weight itself need not stay in memory then, where it is mapped from a file.

https://uxlfoundation.github.io/oneDNN/dev_guide_understanding_memory_formats.html
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

MOST = 1 << 29
"""Bytes of a model's weights that are laid out, at most: larger models gain as little, and have no memory to spare."""
_ROWS = 1024
"""Of the products that an order is chosen for."""
_OF_A_FILE, _THERE = np.uint64(1 << 61), np.uint64(0b11 << 62)
"""Of a page: whether it is a file's or shared; whether it is in memory or in swap space."""


class LaidOut:
    """The orders of one weight, each made when it is first wanted. Copies and pickles begin without."""

    def __init__(self) -> None:
        self._of: tuple[StorageWeakRef, int, int] | None = None
        self._orders: dict[bool, Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return LaidOut, ()

    def operand(self, weight: Tensor, turned: bool) -> Tensor:
        """`weight` [out, in], or where it is `turned` its transpose, as oneDNN wants it.

        What torch knows to have changed since is laid out anew; it does not see what is written through `data`.
        """
        # Memory that was given back may come again at the same address; a storage that is looked at so may not.
        storage = StorageWeakRef(weight.untyped_storage())  # type: ignore[no-untyped-call]
        now = storage, weight.data_ptr(), 0 if weight.is_inference() else weight._version
        if now != self._of:
            self._of, self._orders = now, {}
        if turned not in self._orders:
            self._orders[turned] = ordered(weight.T if turned else weight)
            if len(self._orders) == 2:
                give_back(weight)
        return self._orders[turned]


def ordered(weight: Tensor) -> Tensor:
    """`weight` [out, in] in oneDNN's own order."""
    made: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return made


def size(weight: Tensor) -> int:
    """Bytes of both orders of `weight`."""
    return 2 * weight.nbytes


def give_back(weight: Tensor) -> None:
    """Give the memory of `weight` back to Linux where all of it is that of a file, from which it comes back when read.

    What was written since it was mapped is no longer the file's, and stays.
    """
    if sys.platform != "linux" or not weight.is_contiguous():
        return
    first, end = -(-weight.data_ptr() // mmap.PAGESIZE), (weight.data_ptr() + weight.nbytes) // mmap.PAGESIZE
    if end > first and _are_of_a_file(first, end - first):
        begin, length = (number * mmap.PAGESIZE for number in (first, end - first))
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _are_of_a_file(first: int, count: int) -> bool:
    """Whether each of `count` pages is of a file, or was not touched yet: see Linux's admin-guide/mm/pagemap."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:
            found = np.frombuffer(os.pread(pages.fileno(), 8 * count, 8 * first), dtype=np.uint64)
    except OSError:
        return False
    of_a_file, untouched = found & _OF_A_FILE != 0, found & _THERE == 0
    # Where all of it seems untouched nothing is to be had, or whoever stands in for Linux says nothing.
    return len(found) == count and bool((of_a_file | untouched).all() and of_a_file.any())
