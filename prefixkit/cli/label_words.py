"""`prefixkit label-words`: a verbalizer, searched as AutoPrompt does."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("label-words", no_args_is_help=True)(label_words)


def label_words(
    backbone: Annotated[str, typer.Option(help="Folder or hub id of a masked language model.")],
    data: Annotated[str, typer.Option(help='Examples with labels: {"text", "label"}, one a line.')],
    task: Annotated[str, typer.Option(help='A TOML file with answer = "label" and a {mask} in its template.')],
    words: Annotated[int, typer.Option(min=1, help="Words for each label.")] = 10,
    steps: Annotated[int, typer.Option(min=1, help="Of the linear layer that tells the labels.")] = 500,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal words.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Search the words that a masked language model would say for each label, for a task's verbalizer."""
    from prefixkit.backbones.encoder import Encoder
    from prefixkit.backbones.load import load_backbone
    from prefixkit.cli.training_display import quiet_transformers
    from prefixkit.data.answered import read_answered
    from prefixkit.errors import ConfigError
    from prefixkit.task import load_task, load_tokenizer
    from prefixkit.training.examples import with_labels
    from prefixkit.training.label_search import label_words as search

    quiet_transformers()
    model = load_backbone(backbone)
    if not isinstance(model, Encoder) or model.kind != "encoder":
        raise ConfigError("--backbone", expected="a masked language model", found=f"one of the kind {model.kind}")
    tokenizer = load_tokenizer(model.folder)
    contract = load_task(task, tokenizer, max_length=model.room_for_text(0) or 2048, kind=model.kind)
    if contract.answer != "label":
        raise ConfigError("--task", expected='a task with answer = "label"', found=repr(task))
    examples = read_answered(data, contract)
    contract = with_labels(contract, examples, data)
    found = search(model, contract, tokenizer, examples, words=words, steps=steps, seed=seed)
    if as_json:
        typer.echo(json.dumps({"version": 1, "words": found}, ensure_ascii=False))
        return
    typer.echo("[verbalizer]")
    for label, best in found.items():
        typer.echo(f"{json.dumps(label)} = {json.dumps(best[0], ensure_ascii=False)}  # {', '.join(best[1:])}")
