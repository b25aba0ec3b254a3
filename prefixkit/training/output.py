"""Whether a prefix can be written where the user wants it, asked before the work and not after it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path

from prefixkit.errors import ConfigError


def check_outputs(outputs: Sequence[str], reads: Iterable[Path], backbone: str, where: str) -> None:
    """`check_output` for every file that one command writes, before the first of them.

    Raises:
        ConfigError: as `check_output`; or one place under two names.
    """
    read, places = list(reads), [Path(output).resolve() for output in outputs]
    for output in outputs:
        check_output(output, read, backbone)
    if len(set(places)) < len(places):
        raise ConfigError(where, expected="an output of its own for each file", found=", ".join(outputs))


def check_output(output: str | Path, reads: Iterable[Path], backbone: str) -> None:
    """Refuse an output that could not be written after hours of work, or that would replace what the work reads.

    Raises:
        ConfigError: no such folder, no permission, the path of a folder or a device, a folder where the state would be
            kept, one of the files in `reads`, or a place inside the backbone's folder.
    """
    path = Path(output)
    # os.path answers False where pathlib raises, as for a sentence in the place of a file name.
    if os.path.isdir(path):
        raise ConfigError(path, expected="the path of a file", found="a folder", next_step="add a file name")
    if os.path.isdir(state := f"{path}.checkpoint"):
        raise ConfigError(state, expected="a file, or none", found="a folder", next_step="choose another output")
    if os.path.exists(path) and not stat.S_ISREG(path.stat().st_mode):
        raise ConfigError(path, expected="the path of a file", found="a device", next_step="choose another name")
    if not os.path.isdir(path.parent):
        raise ConfigError(path, expected="an existing folder", found=f"no {path.parent}", next_step="create it first")
    for given in reads:
        if os.path.exists(path) and os.path.exists(given) and path.samefile(given):
            raise ConfigError(
                path, expected="a new file", found="an input of this run", next_step="choose another name"
            )
    if path.resolve().is_relative_to(Path(backbone).resolve()):
        raise ConfigError(path, expected="a place outside the backbone's folder", found="one inside it")
    _probe(path)


def _probe(path: Path) -> None:
    # The longest name that a run will write beside its output.
    probe = Path(f"{path}.checkpoint.probe")
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_WRONLY))
        # Processes of one run may ask at once.
        probe.unlink(missing_ok=True)
    except OSError as error:
        found = error.strerror or str(error)
        raise ConfigError(
            path, expected="a file that can be written", found=found, next_step="choose another"
        ) from error
