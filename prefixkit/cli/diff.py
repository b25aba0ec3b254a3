"""`prefixkit diff`: where two prefix files differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from prefixkit.prefix import Prefix

JSON_VERSION = 1
_DIFFERENT = 3
"""Not 1, which is a fault of ours."""


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("diff", no_args_is_help=True)(diff)


def diff(
    first: Annotated[Path, typer.Argument(help="A prefix file.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    exit_code: Annotated[
        bool, typer.Option("--exit-code", help="Exit with 3 where they differ; 1 and 2 remain errors.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two prefix files: what they say and what they hold."""
    from prefixkit.prefix import load

    report = _report(load(first), load(second))
    if as_json:
        typer.echo(json.dumps(report, sort_keys=True, indent=2))
    else:
        _show(report)
    if exit_code and not report["equal"]:
        raise typer.Exit(_DIFFERENT)


def _report(ours: Prefix, theirs: Prefix) -> dict[str, Any]:
    """The document that `--json` prints: stable within its version, the source of what a person sees."""
    from prefixkit.algebra import apart
    from prefixkit.prefix import compare

    found = compare(ours, theirs)
    return {
        "version": JSON_VERSION,
        "equal": not found,
        "tensors_equal": all(one.where.startswith("/") for one in found),
        "differences": [{"where": one.where, "how": one.how} for one in found],
        "tensors": [vars(one) for one in apart(ours, theirs)],
    }


def _show(report: dict[str, Any]) -> None:
    from prefixkit.cli.printable import printable

    if report["equal"]:
        typer.echo("equal")
    elif report["tensors_equal"]:
        typer.echo("tensors: equal")
    measured = {one["name"]: one for one in report["tensors"]}
    for one in report["differences"]:
        line = f"{one['where']}: {one['how']}"
        if (numbers := measured.get(one["where"])) is not None:
            cosine = "none" if numbers["cosine"] is None else f"{numbers['cosine']:.6f}"
            line = f"{one['where']}: max {numbers['max']:g}, mean {numbers['mean']:g}, cosine {cosine}"
            line += f" ({one['how']})" * (not one["how"].startswith("numbers"))
        typer.echo(printable(line))
