"""The standard streams of the command: able to show any text, and written to the end before it calls itself done."""

from __future__ import annotations

import errno
import os
import sys
from io import TextIOWrapper

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)


def prepare() -> bool:
    """Make the streams ready; False where standard output is closed, before hours of work go nowhere."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - it lives as long as the process
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            # A terminal without Unicode shows escapes rather than an error.
            stream.reconfigure(errors="backslashreplace")
    return sys.stdout is not None


def is_output_failure(error: Exception) -> bool:
    """Whether `error` says that a stream took no more; errors of files name their file."""
    return isinstance(error, OSError) and error.filename is None and error.errno in _FULL


def settle() -> None:
    """Write out what is left. What cannot be written is dropped, or Python would complain of it once more."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
