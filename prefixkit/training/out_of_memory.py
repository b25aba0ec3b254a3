"""Running out of memory in a step, told in a line that says what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from prefixkit.errors import ConfigError

SMALLER = "use a smaller --batch-size or --gradient-checkpointing"
_OF_THE_CPU = ("DefaultCPUAllocator", "can't allocate memory", "not enough memory")


class OutOfMemoryError(ConfigError):
    """A step needs more memory than there is."""


def ran_out(error: BaseException) -> bool:
    """Whether `error` is of memory that could not be had, on whatever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(told in str(error) for told in _OF_THE_CPU)


@contextmanager
def in_a_line(where: str, expected: str, advice: Callable[[], str]) -> Iterator[None]:
    """Tell of memory that ran out in the `with` block, and what to do.

    Raises:
        OutOfMemoryError: it did.
    """
    try:
        yield
    except Exception as error:
        if not ran_out(error):
            raise
        # The frames of the step hold its tensors, and there is more to do than to say so.
        error.__traceback__ = None
        raise OutOfMemoryError(where, expected=expected, found="none left", next_step=advice()) from None
