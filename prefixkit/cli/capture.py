"""`prefixkit capture`: a context as a prefix, with no training."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("capture", no_args_is_help=True)(capture)


def capture(
    text: Annotated[str, typer.Option(help="A text file: few-shot examples, a system prompt; - reads standard input.")],
    backbone: Annotated[str, typer.Option(help="Folder or hub id of the frozen model.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The prefix file to write.")],
    task: Annotated[
        str, typer.Option(help="How the text that follows is written; for chat the file is the system message.")
    ] = "continuation",
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="What the backbone computes in.")] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Keep the keys and values of a context, so that text behind them needs the context no more."""
    from prefixkit.backbones.load import load_decoder
    from prefixkit.cli.training_display import quiet_transformers
    from prefixkit.prefix import save
    from prefixkit.training import capture as capturing
    from prefixkit.training.loading import device as chosen
    from prefixkit.training.output import check_output

    quiet_transformers()
    check_output(output, [Path(text), Path(task)], backbone)
    context, where = _read(text)
    decoder = load_decoder(backbone, device=chosen(device), dtype=dtype)
    prefix = save(capturing.capture(decoder, context, task=task, where=where), output)
    length = prefix.manifest.injections[0].length
    if as_json:
        result = {"version": 1, "output": str(output), "length": length, "content": prefix.manifest.content}
        typer.echo(json.dumps(result, sort_keys=True))
        return
    typer.echo(f"wrote {output} ({length} slots)")
    typer.echo(f"next: prefixkit export --onnx {output} --backbone {backbone} -o served")


def _read(text: str) -> tuple[str, str]:
    """The text, and what messages call it."""
    from prefixkit.methods.document import document_text, read_document

    if text != "-":
        return read_document(text), text
    # Python has no stream where standard input is closed.
    data = sys.stdin.buffer.read() if sys.stdin is not None else b""
    return document_text(data, "standard input"), "standard input"
