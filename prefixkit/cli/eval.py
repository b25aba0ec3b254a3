"""`prefixkit eval`: the task's metrics for a prefix, as the papers compute them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from prefixkit.backbones.backbone import Backbone
    from prefixkit.format.manifest import TaskRecord
    from prefixkit.prefix import Prefix
    from prefixkit.task import ModelTokenizer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("eval", no_args_is_help=True)(evaluate)


def evaluate(
    prefix: Annotated[Path, typer.Argument(help="The prefix file.")],
    backbone: Annotated[str, typer.Option(help="Folder or hub id of the model that it was made for.")],
    data: Annotated[str, typer.Option(help="Examples: JSONL or E2E lines; equal inputs are grouped.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N inputs.")] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beam width; 1 is greedy.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written for an input, at most.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs at a time.")] = 32,
    no_prefix: Annotated[bool, typer.Option("--no-prefix", help="Score the bare model on the same task.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write texts and references as JSONL.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="What the backbone computes in.")] = "float32",
    allow_mismatch: Annotated[bool, typer.Option("--allow-mismatch", help="Take another backbone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a prefix: loss, and BLEU, NIST, ROUGE-L and CIDEr of what the model writes with it."""
    from prefixkit.cli.training_display import progress_of, quiet_transformers
    from prefixkit.data.batches import encode_examples
    from prefixkit.data.readers import read_examples
    from prefixkit.injections import injection
    from prefixkit.prefix import load
    from prefixkit.task import input_fields
    from prefixkit.training import evaluation
    from prefixkit.training.loop import mean_loss

    quiet_transformers()
    loaded = load(prefix)
    task = required_task(prefix, loaded.manifest.task)
    model, tokenizer = _fitting(loaded, task, backbone, device, dtype, allow_mismatch)
    groups = evaluation.grouped(read_examples(data, fields=input_fields(task)), limit)
    received = None if no_prefix else model.fold(injection(loaded))
    task = evaluation.within_context(task, model, received)
    examples = encode_examples(task, tokenizer, evaluation.ungrouped(groups))
    generation = {"num_beams": num_beams, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    with progress_of("writing", len(groups)) as done:
        written = evaluation.write(model, task, tokenizer, groups, received, **generation, done=done)
    metrics = {"loss": mean_loss(model, examples, received, batch_size), **evaluation.scores(written)}
    if output is not None:
        _write(output, written)
    _print(metrics, len(groups), len(examples), as_json)


def _fitting(
    prefix: Prefix, task: TaskRecord, backbone: str, device: str, dtype: str, allow_mismatch: bool
) -> tuple[Backbone, ModelTokenizer]:
    """The backbone that the prefix was made for, and its tokenizer, which can do what the task promises."""
    from prefixkit.backbones.load import load_backbone
    from prefixkit.prefix import matches
    from prefixkit.task import check_task, load_tokenizer
    from prefixkit.training.preparation import device as chosen

    model = load_backbone(backbone, device=chosen(device), dtype=dtype)
    matches(prefix, model.identity, allow_mismatch=allow_mismatch)
    tokenizer = load_tokenizer(model.folder)
    check_task(task, tokenizer)
    return model, tokenizer


def required_task(where: Path, task: Any) -> Any:
    """The usage contract of a file. Raises ConfigError for a file that states none."""
    from prefixkit.errors import ConfigError

    if task is None:
        raise ConfigError(where, expected="a usage contract (task)", found="none", next_step="train a prefix with one")
    return task


def _write(path: Path, written: list[Any]) -> None:
    from prefixkit.format.atomic import write_bytes

    lines = (
        json.dumps({**one.group.fields, "written": one.text, "references": one.group.references}, ensure_ascii=False)
        for one in written
    )
    write_bytes(path, ("\n".join(lines) + "\n").encode())


def _print(metrics: dict[str, float], inputs: int, references: int, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"version": 1, "inputs": inputs, "references": references, "metrics": metrics}))
        return
    typer.echo(f"{inputs} inputs, {references} references")
    for name, value in metrics.items():
        typer.echo(f"{name:8} {value:.4f}")
