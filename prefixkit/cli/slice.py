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
    slots: Annotated[
        str,
        typer.Argument(help="START:STOP, as Python slices: :16, 16:, -8: for the last eight, or all where fewer are."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The prefix file to write.")],
    backbone: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of its model: needed to move keys where it has rotary positions."),
    ] = None,
) -> None:
    """Keep some of a prefix's slots, as a prefix that begins at position 0."""
    from prefixkit.algebra import cut
    from prefixkit.algebra.slice import bounds, spans_of
    from prefixkit.cli.derive import read, rotations_of, write

    start, stop = bounds(slots)
    (loaded,) = read([prefix], output, "slice")
    moved = any(span.start for span in spans_of(loaded, start, stop))
    turned = rotations_of(backbone, [loaded], "slice", moved=moved)
    write(cut(loaded, start, stop, rotations=turned), output, [prefix])
