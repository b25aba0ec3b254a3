"""`prefixkit import`: another runtime's prefix as a prefix file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from prefixkit.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("import", no_args_is_help=True)(import_)


def import_(
    source: Annotated[Path, typer.Argument(help="What the other runtime saved.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The prefix file to write.")],
    peft: Annotated[bool, typer.Option("--peft", help="A PEFT folder: prefix tuning or a cartridge.")] = False,
    backbone: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the model that it was trained on: checks shapes, binds to its weights."),
    ] = None,
) -> None:
    """Bring a prefix over from another runtime, bit for bit."""
    if not peft:
        raise ConfigError("import", expected="where the prefix comes from", found="nothing", next_step="add --peft")
    from prefixkit.bridges.peft import import_peft
    from prefixkit.cli.training_display import quiet_transformers
    from prefixkit.prefix import save

    quiet_transformers()
    prefix = save(import_peft(source, backbone=backbone), output)
    bound = prefix.manifest.backbone
    if bound.weights_hash is None:
        typer.echo(f"weights of {bound.name} unknown: only its configuration will be checked; --backbone binds them")
    typer.echo(f"wrote {output} for {bound.name}")
    typer.echo(f"next: prefixkit inspect {output}")
