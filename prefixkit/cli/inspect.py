"""`prefixkit inspect`: what a prefix file is, without loading a model or an array library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from prefixkit.format.checks import Problem
    from prefixkit.format.stored import StoredPrefix

JSON_VERSION = 1


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("inspect")(inspect)


def inspect(
    prefix: Annotated[Path, typer.Argument(help="A prefix file.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    backbone: Annotated[
        Path | None, typer.Option(help="A model folder: check that the prefix was made for exactly these weights.")
    ] = None,
) -> None:
    """Explain a prefix file: its backbone, sizes, positions, usage, origin, and everything wrong with it."""
    from prefixkit.cli import render
    from prefixkit.errors import MismatchError
    from prefixkit.format.header import read_tensors
    from prefixkit.format.stored import data_problems, read_stored, refuse

    stored = read_stored(prefix)
    problems = stored.problems or tuple(data_problems(stored, read_tensors(prefix, stored.header)))
    report = _report(stored, problems)
    mismatch = None
    if backbone is not None and not problems:
        try:
            report["match"] = _match(stored, backbone)
        except MismatchError as error:
            mismatch = error
            report["match"] = {"level": None, "message": str(error)}
    if as_json:
        typer.echo(json.dumps(report, sort_keys=True, indent=2))
    else:
        render.show(report)
    refuse(prefix, problems, next_step="listed above" if len(problems) > 1 else "")
    if mismatch is not None:
        raise mismatch


def _report(stored: StoredPrefix, problems: tuple[Problem, ...]) -> dict[str, Any]:
    """The document that `--json` prints: stable within its version, the source of what a person sees."""
    report: dict[str, Any] = {
        "version": JSON_VERSION,
        "path": str(stored.path),
        "bytes": stored.path.stat().st_size,
        "problems": [{"pointer": problem.pointer, "message": problem.message} for problem in problems],
        "manifest": None,
        "tensors": [],
        "match": None,
    }
    # Nothing is told of a broken file as if it were so.
    if not problems:
        report["manifest"] = stored.document
        report["tensors"] = _tensors(stored)
    return report


def _tensors(stored: StoredPrefix) -> list[dict[str, Any]]:
    """Each tensor, with the index of the injection that it belongs to."""
    from prefixkit.format.consistency import expected_shapes

    owners = expected_shapes(stored.document)
    return [
        {
            "name": name,
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "bytes": entry.end - entry.begin,
            "injection": int(owners[name][0].rpartition("/")[2]),
        }
        for name, entry in stored.header.tensors.items()
    ]


def _match(stored: StoredPrefix, folder: Path) -> dict[str, Any]:
    from prefixkit.errors import BackboneError
    from prefixkit.format.manifest import parse
    from prefixkit.format.match import check, facts, folder_facts

    if not folder.is_dir():
        step = "download the model and give its folder; inspect does not reach for the hub"
        what = "a file" if folder.exists() else "none of that name"
        raise BackboneError(f"--backbone {folder}", expected="a local model folder", found=what, next_step=step)
    made_for, found = facts(parse(stored.document).backbone), folder_facts(folder)
    level = check(f"{stored.path} on {folder}", made_for, found)
    # A tokenizer that differs has been refused.
    compared = None not in (*made_for["tokenizer"].values(), *found["tokenizer"].values())
    return {"level": level, "same_tokenizer": True if compared else None}
