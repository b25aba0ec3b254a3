"""`prefixkit import`: another runtime's prefix as a prefix file."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prefixkit.bridges.catalogue import function, runtime
from prefixkit.cli.onto_itself import refuse_own_input
from prefixkit.cli.runtime_flags import one_of, with_flags
from prefixkit.errors import ConfigError

if TYPE_CHECKING:
    from prefixkit.prefix import Prefix


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
    task: Annotated[
        str | None,
        typer.Option(help="How the prefix is asked, which the other runtime did not keep: a name or a .toml file."),
    ] = None,
    **runtimes: bool,
) -> None:
    """Bring a prefix over from another runtime, bit for bit."""
    row = runtime(one_of("import", runtimes, "where the prefix comes from"))
    if task is not None and backbone is None:
        step = "a task is written for a tokenizer"
        raise ConfigError(f"import --{row.name} --task", expected="--backbone", found="none", next_step=step)
    refuse_own_input(output, [source], f"import --{row.name}")
    from prefixkit.cli.training_display import quiet_transformers
    from prefixkit.prefix import save

    quiet_transformers()
    assert row.importer is not None
    imported: Prefix = function(row.importer)(source, backbone=backbone)
    if task is not None and backbone is not None:
        imported = _asked(imported, task, backbone)
    bound = save(imported, output).manifest.backbone
    for sentence in imported.manifest.provenance.config.get("lost", ()):
        typer.echo(f"warning: {sentence}", err=True)
    if bound.weights_hash is None:
        typer.echo(f"weights of {bound.name} unknown: only its configuration will be checked; --backbone binds them")
    if task is None:
        typer.echo("how it is asked is unknown: --task says it, so that `eval` and `generate` know")
    typer.echo(f"wrote {output} for {bound.name}")
    typer.echo(f"next: prefixkit inspect {shlex.quote(str(output))}")


def _asked(prefix: Prefix, task: str, backbone: str) -> Prefix:
    """`prefix` with the task that `task` names, in what room it leaves."""
    from prefixkit.backbones.load import find_folder
    from prefixkit.serving.prompts import UNBOUNDED
    from prefixkit.task import load_task, load_tokenizer

    identity = prefix.manifest.backbone
    taken = [record.positions.text_start for record in prefix.manifest.injections if record.positions is not None]
    room = (identity.context_length or UNBOUNDED) - max(taken, default=0)
    kind = "encoder-decoder" if len(identity.stacks) == 2 else "decoder"
    made = load_task(task, load_tokenizer(find_folder(backbone, None)), max_length=room, kind=kind)
    return replace(prefix, manifest=replace(prefix.manifest, task=made))
