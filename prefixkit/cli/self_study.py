"""`prefixkit self-study`: conversations about a document, for training a cartridge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("self-study", no_args_is_help=True)(self_study)


def self_study(
    document: Annotated[Path, typer.Argument(help="A text file that the backbone's context holds.")],
    backbone: Annotated[str, typer.Option(help="Folder or hub id of the model that asks and answers.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSONL file to write.")],
    count: Annotated[int, typer.Option(min=1, help="Questions; those without an answer are left out.")] = 512,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the answers; 0 is greedy.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at a time.")] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal files.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="What the backbone computes in.")] = "float32",
) -> None:
    """Let the backbone ask and answer about a document, for `train --method cartridge --task continuation`."""
    from prefixkit.backbones.load import load_decoder
    from prefixkit.cli.jsonl import write_jsonl
    from prefixkit.cli.training_display import progress_of, quiet_transformers
    from prefixkit.methods.document import read_document
    from prefixkit.task import load_tokenizer
    from prefixkit.training import self_study as study
    from prefixkit.training.loading import device as chosen
    from prefixkit.training.output import check_output

    quiet_transformers()
    check_output(output, [document], backbone)
    text = read_document(document)
    model = load_decoder(backbone, device=chosen(device), dtype=dtype)
    tokenizer = load_tokenizer(model.folder)
    with progress_of("studying", count) as done:
        records = study.self_study(
            model,
            tokenizer,
            text,
            count=count,
            seed=seed,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            batch_size=batch_size,
            done=done,
        )
    write_jsonl(output, records)
    typer.echo(f"wrote {output} ({len(records)} conversations)")
    options = f"--task continuation --set method.document={document} --data {output}"
    typer.echo(f"next: prefixkit train --method cartridge {options} …")
