"""`prefixkit methods`: what can be trained."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("methods")(methods)


def methods(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the methods: what each trains, on which backbones, and its paper."""
    from prefixkit.methods.catalogue import METHODS

    if as_json:
        typer.echo(json.dumps({"version": 1, "methods": [asdict(entry) for entry in METHODS.values()]}, sort_keys=True))
        return
    for entry in METHODS.values():
        typer.echo(f"{entry.name}  {entry.trains} ({', '.join(entry.backbones)}; {entry.paper})")
        if entry.init:
            typer.echo(f"    --init {', '.join(entry.init)}")
