"""`prefixkit slice`: some of a prefix's slots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    # Without this, -8: would be read as an option.
    unknown = {"ignore_unknown_options": True}
    app.command("slice", no_args_is_help=True, context_settings=unknown)(slice_)


def slice_(
    prefix: Annotated[Path, typer.Argument(help="A prefix file.")],
    slots: Annotated[str, typer.Argument(help="START:STOP, as Python slices: :16, 16:, -8: for the last eight.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The prefix file to write.")],
    backbone: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of its model: needed to move keys where it has rotary positions."),
    ] = None,
) -> None:
    """Keep some of a prefix's slots, as a prefix that begins at position 0."""
    from prefixkit.algebra import cut
    from prefixkit.algebra.slice import bounds
    from prefixkit.cli.derive import rotations_of, write
    from prefixkit.prefix import load

    loaded = load(prefix)
    length = next((record.length for record in loaded.manifest.injections if record.length is not None), 0)
    start, stop = bounds(slots, length)
    turned = rotations_of(backbone, loaded, moved=start != 0)
    write(cut(loaded, start, stop, rotations=turned), output, [prefix])
