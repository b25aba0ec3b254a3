"""`prefixkit runtimes`: where a prefix can go, and where it can come from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from prefixkit.bridges.catalogue import RUNTIMES, Runtime
from prefixkit.cli.render import Section, show_sections


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("runtimes")(runtimes)


def runtimes(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """List the runtimes: what goes there, what does not and why, and how."""
    if as_json:
        typer.echo(json.dumps({"version": 1, "runtimes": [_document(row) for row in RUNTIMES]}, sort_keys=True))
        return
    show_sections([_section(row) for row in RUNTIMES])


def _document(row: Runtime) -> dict[str, Any]:
    stored = {name: value for name, value in vars(row).items() if name not in ("exporter", "importer", "settings")}
    exports, imports = row.exporter is not None, row.importer is not None
    settings = {name: list(values) for name, values in row.settings.items()}
    return {**stored, "export": exports, "import": imports, "settings": settings}


def _section(row: Runtime) -> Section:
    return row.title, [(label, told) for label, told in _rows(row) if told]


def _rows(row: Runtime) -> Iterator[tuple[str, str]]:
    yield "goes", row.goes
    yield "stays", row.stays
    if row.exporter is not None:
        backbone = " --backbone MODEL" if row.backbone else ""
        yield "out", f"prefixkit export --{row.name} PREFIX{backbone} -o OUT: {row.writes}"
    if row.importer is not None:
        yield "in", f"prefixkit import --{row.name} IN -o PREFIX: {row.reads}"
    yield "how", row.how
    yield "settings", "; ".join(f"{name}={'|'.join(values)}" for name, values in row.settings.items())
    yield "extra", f"pip install 'prefixkit[{row.extra}]'" if row.extra else ""
    yield "tried", row.tried
