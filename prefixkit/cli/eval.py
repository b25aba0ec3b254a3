"""`prefixkit eval`: the task's metrics for a prefix, as the papers compute them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixkit.cli import run_options as options

if TYPE_CHECKING:
    from prefixkit.backbones.backbone import Backbone
    from prefixkit.format.manifest import TaskRecord
    from prefixkit.prefix import Prefix
    from prefixkit.task import ModelTokenizer


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("eval", no_args_is_help=True)(evaluate)


def evaluate(
    prefix: Annotated[list[Path], typer.Argument(help="The prefix file; several choose labels by majority.")],
    backbone: Annotated[str, typer.Option(help="Folder or hub id of the model that it was made for.")],
    data: Annotated[str, typer.Option(help="Examples: JSONL or E2E lines; equal inputs are grouped.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N inputs.")] = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Beam width; 1 is greedy.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens written for an input, at most.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Inputs at a time.")] = 32,
    mixture: Annotated[bool, typer.Option("--mixture", help="Weigh several prompts as they were trained.")] = False,
    no_prefix: Annotated[bool, typer.Option("--no-prefix", help="Score the bare model on the same task.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write texts and references as JSONL.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="What the backbone computes in.")] = "float32",
    quantize: options.Quantize = None,
    allow_mismatch: Annotated[bool, typer.Option("--allow-mismatch", help="Take another backbone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Score a prefix: loss, and BLEU, NIST, ROUGE-L and CIDEr of what the model writes with it.

    A task with labels is scored by accuracy and F1 of those that the model or the file's head chooses, one with
    choices by accuracy; tags by the F1 of whole entities, spans by F1 and exact match as SQuAD has them.
    """
    from prefixkit.cli.jsonl import write_jsonl
    from prefixkit.cli.training_display import progress_of, quiet_transformers
    from prefixkit.errors import ConfigError
    from prefixkit.injections import TaskHead, injection, part_of
    from prefixkit.prefix import load
    from prefixkit.task import without_slots
    from prefixkit.training.scoring import Scoring, score, score_mixture

    quiet_transformers()
    files = [load(path) for path in prefix]
    if mixture and no_prefix:
        raise ConfigError("--no-prefix", expected="one without --mixture", found="both", next_step="leave one out")
    task = _patterns(prefix, files)[0] if mixture else _common_task(prefix, files)
    model, tokenizer = _fitting(files, task, backbone, (device, dtype, quantize), allow_mismatch)
    _tell_rounding(prefix, files, quantize)
    given = [injection(file) for file in files]
    # Without its prefix a head still reads the bare model.
    task = without_slots(task) if no_prefix else task
    received = [part_of(one, TaskHead) for one in given] if no_prefix else given
    how = Scoring(
        progress=progress_of, limit=limit, batch_size=batch_size, num_beams=num_beams, max_new_tokens=max_new_tokens
    )
    if mixture:
        assert tokenizer is not None
        weights = [file.manifest.provenance.metrics["mixture_weight"] for file in files]
        scored = score_mixture(model, _patterns(prefix, files), tokenizer, data, given, weights, how)
    else:
        scored = score(model, task, tokenizer, data, received, how)
    if output is not None:
        write_jsonl(output, scored.records)
    _print(scored.metrics, scored.inputs, scored.references, as_json)


def _tell_rounding(paths: list[Path], files: list[Prefix], quantize: str | None) -> None:
    """Say so where weights are rounded otherwise than in training: the scores are those of another model."""
    for path, file in zip(paths, files, strict=True):
        trained = file.manifest.provenance.config.get("quantize")
        if trained != quantize:
            told = f"{path}: trained with --quantize {trained}" if trained else f"{path}: trained without --quantize"
            typer.echo(f"{told}, and scored {f'with {quantize}' if quantize else 'without'}", err=True)


def _patterns(paths: list[Path], files: list[Prefix]) -> list[TaskRecord]:
    """The usage contract of each pattern of a mixture. Raises ConfigError for files of another kind of training."""
    from prefixkit.errors import ConfigError

    for path, file in zip(paths, files, strict=True):
        if "mixture_weight" not in file.manifest.provenance.metrics:
            step = "train them together with [[patterns]]"
            raise ConfigError(path, expected="a weight in a mixture", found="none", next_step=step)
    return [required_task(path, file.manifest.task) for path, file in zip(paths, files, strict=True)]


def _common_task(paths: list[Path], files: list[Prefix]) -> TaskRecord:
    """The one usage contract of all files. Raises ConfigError for several, or for several that would write."""
    from dataclasses import replace

    from prefixkit.errors import ConfigError

    tasks: list[TaskRecord] = [required_task(path, file.manifest.task) for path, file in zip(paths, files, strict=True)]
    for path, task in zip(paths[1:], tasks[1:], strict=True):
        if replace(task, name=tasks[0].name, max_length=tasks[0].max_length) != tasks[0]:
            raise ConfigError(path, expected=f"the task of {paths[0]}", found=f"another, {task.name!r}")
        if task.verbalizer is None:
            step = "score them one by one"
            raise ConfigError(path, expected="one prefix for a task that writes", found="a second", next_step=step)
    return min(tasks, key=lambda task: task.max_length)


def _fitting(
    files: list[Prefix],
    task: TaskRecord,
    backbone: str,
    how: tuple[str, str, str | None],
    allow_mismatch: bool,
) -> tuple[Backbone, ModelTokenizer | None]:
    """The backbone that every prefix was made for, and its tokenizer, which can do what the task promises.

    Args:
        how: the device, dtype and quantisation of the backbone.
    """
    from prefixkit.backbones.load import load_backbone
    from prefixkit.prefix import matches
    from prefixkit.task import check_task, load_tokenizer
    from prefixkit.training.loading import device as chosen

    device, dtype, quantize = how
    if quantize is not None:
        _refuse_deltas(files)
    model = load_backbone(backbone, device=chosen(device), dtype=dtype, quantize=quantize)
    for file in files:
        matches(file, model.identity, allow_mismatch=allow_mismatch)
    if task.image is not None:
        return model, None
    tokenizer = load_tokenizer(model.folder)
    check_task(task, tokenizer)
    return model, tokenizer


def _refuse_deltas(files: list[Prefix]) -> None:
    from prefixkit.errors import ConfigError

    if any(record.kind == "parameter_delta" for file in files for record in file.manifest.injections):
        expected, step = "a file that leaves the backbone's parameters alone", "leave --quantize out"
        raise ConfigError("--quantize", expected=expected, found="a parameter_delta", next_step=step)


def required_task(where: Path, task: Any) -> Any:
    """The usage contract of a file. Raises ConfigError for a file that states none."""
    from prefixkit.errors import ConfigError

    if task is None:
        raise ConfigError(
            where,
            expected="a usage contract (task)",
            found="none",
            next_step="train a prefix with one, or import it with --task",
        )
    return task


def _print(metrics: dict[str, float], inputs: int, references: int, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"version": 1, "inputs": inputs, "references": references, "metrics": metrics}))
        return
    typer.echo(f"{inputs} inputs, {references} references")
    for name, value in metrics.items():
        typer.echo(f"{name:8} {value:.4f}")
