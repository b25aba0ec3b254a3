"""`prefixkit compose`: prefixes one behind the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("compose", no_args_is_help=True)(compose)


def compose(
    prefixes: Annotated[list[Path], typer.Argument(help="Prefix files, in the order in which they are to stand.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The prefix file to write.")],
    backbone: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of their model: needed to move keys where it has rotary positions."),
    ] = None,
) -> None:
    """Put prefixes one behind the other. Soft prompts become one prompt; keys and values stay each part's own."""
    from prefixkit.algebra import compose as composed
    from prefixkit.cli.derive import read, rotations_of, write

    loaded = read(prefixes, output, "compose")
    write(composed(loaded, rotations=rotations_of(backbone, loaded, "compose")), output, prefixes)
