"""A command that would write over what it reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefixkit.errors import ConfigError


def refuse_own_input(output: Path, inputs: Sequence[Path], command: str) -> None:
    """Refuse to write over a file or folder that `command` reads: a derived prefix names its parents, which must stay.

    Raises:
        ConfigError: `output` is one of `inputs`, by whatever path or link.
    """
    if output.resolve() in {path.resolve() for path in inputs}:
        raise ConfigError(
            f"{command}: {output}",
            expected="an output beside the inputs",
            found="one of the inputs",
            next_step="name another with -o",
        )
