"""The heap of a process that trains on a CPU: pieces that are too small for a larger batch are given back before it.

Freed tensors stay with the process, in pieces of their size, into which the slightly larger ones of a longer batch do
not go: without this the heap of a run grows to twice what its largest step needs.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from functools import partial

import torch


def trimmer(device: torch.device) -> Callable[[], object] | None:
    """What gives back free pages of the heap; None where tensors are elsewhere, or the C library has no such thing."""
    if device.type != "cpu" or sys.platform != "linux":
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    return None if trim is None else partial(trim, 0)


class Heap:
    """The heap of one run.

    Args:
        trim: gives back what is free.
    """

    def __init__(self, trim: Callable[[], object] | None = None) -> None:
        self._trim, self._largest = trim, 0

    def make_room(self, tokens: int) -> None:
        """Give back what is free, where a batch of `tokens` is larger than all before it."""
        if tokens > self._largest:
            self._largest = tokens
            if self._trim is not None:
                self._trim()
