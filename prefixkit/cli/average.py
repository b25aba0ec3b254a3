"""`prefixkit average`: the mean of prefixes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixkit.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("average", no_args_is_help=True)(average)


def average(
    prefixes: Annotated[list[Path], typer.Argument(help="Prefix files of one backbone and one length.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The prefix file to write.")],
    weights: Annotated[
        str | None, typer.Option(help="A number for each, such as 0.7,0.3; they are divided by their sum.")
    ] = None,
) -> None:
    """Average prefixes number by number, as of runs that began alike."""
    from prefixkit.algebra import average as averaged
    from prefixkit.cli.derive import read, write

    shares = None if weights is None else _numbers(weights)
    write(averaged(read(prefixes, output, "average"), shares), output, prefixes)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        expected = "numbers with commas between them"
        raise ConfigError("--weights", expected=expected, found=repr(text)[:80], next_step="such as 0.7,0.3") from None
