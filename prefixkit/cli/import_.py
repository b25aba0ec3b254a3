"""`prefixkit import`: another runtime's prefix as a prefix file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixkit.bridges.catalogue import function, runtime
from prefixkit.cli.runtime_flags import one_of, with_flags


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("import", no_args_is_help=True)(import_)


@with_flags("reads")
def import_(
    source: Annotated[Path, typer.Argument(help="What the other runtime saved.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The prefix file to write.")],
    backbone: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the model that it was trained on: checks shapes, binds to its weights."),
    ] = None,
    **runtimes: bool,
) -> None:
    """Bring a prefix over from another runtime, bit for bit."""
    row = runtime(one_of("import", runtimes, "where the prefix comes from"))
    from prefixkit.cli.training_display import quiet_transformers
    from prefixkit.prefix import Prefix, save

    quiet_transformers()
    assert row.importer is not None
    imported: Prefix = function(row.importer)(source, backbone=backbone)
    bound = save(imported, output).manifest.backbone
    for sentence in imported.manifest.provenance.config.get("lost", ()):
        typer.echo(f"warning: {sentence}", err=True)
    if bound.weights_hash is None:
        typer.echo(f"weights of {bound.name} unknown: only its configuration will be checked; --backbone binds them")
    typer.echo(f"wrote {output} for {bound.name}")
    typer.echo(f"next: prefixkit inspect {output}")
