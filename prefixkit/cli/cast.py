"""`prefixkit cast`: a prefix in another dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("cast", no_args_is_help=True)(cast)


def cast(
    prefix: Annotated[Path, typer.Argument(help="A prefix file.")],
    dtype: Annotated[str, typer.Option(help="float16, bfloat16 or float32.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The prefix file to write.")],
) -> None:
    """Store a prefix in another dtype; says what rounding did, and refuses numbers that do not fit."""
    from prefixkit.algebra import cast as converted
    from prefixkit.cli.derive import read, write

    (loaded,) = read([prefix], output, "cast")
    write(converted(loaded, dtype), output, [prefix])
