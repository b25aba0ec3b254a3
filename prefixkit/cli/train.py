"""`prefixkit train`: a prefix from a backbone and data."""

from __future__ import annotations

import json
import shlex
from typing import Annotated, Any

import typer

from prefixkit.cli import run_options as options
from prefixkit.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("train", no_args_is_help=True)(train)


def train(
    backbone: options.Backbone = None,
    method: options.Method = None,
    data: options.Data = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="The prefix file to write.")] = None,
    eval_data: options.EvalData = None,
    task: options.Task = None,
    length: options.Length = None,
    init: options.Init = None,
    steps: options.Steps = None,
    epochs: options.Epochs = None,
    lr: options.Rate = None,
    batch_size: options.BatchSize = None,
    seed: options.Seed = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    gradient_checkpointing: options.Checkpointing = None,
    compile: options.Compile = None,
    config: options.Config = None,
    assignments: options.Assignments = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where an interrupted run stopped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a prefix against a frozen backbone and write it as one file."""
    given = dict(locals())
    from prefixkit.cli.training_display import TrainingDisplay, quiet_transformers
    from prefixkit.training.config import from_mapping
    from prefixkit.training.loop import train as run
    from prefixkit.training.processes import is_first, told_once

    quiet_transformers()
    with told_once():
        settings = options.settings_of(config, given, assignments)
    where = str(config) if config is not None else "train"
    if "tasks" in settings or "patterns" in settings:
        _train_several(settings, where, resume, as_json)
        return
    with told_once():
        run_config = from_mapping(settings, where)
    with TrainingDisplay(shown=is_first()) as display:
        prefix = run(run_config, resume=resume, listener=display)
    if is_first():
        _print_result(run_config.output, dict(prefix.manifest.provenance.metrics), prefix.manifest.content, as_json)


def _train_several(settings: dict[str, Any], where: str, resume: bool, as_json: bool) -> None:
    """Several tasks with one prefix, or several patterns of one mixture: a file each."""
    from prefixkit.cli.training_display import TrainingDisplay
    from prefixkit.training.mixture import patterns_from, train_mixture
    from prefixkit.training.together import runs_from, train_together

    if resume:
        step = "start anew, or go on from a file with --init prefix:FILE"
        raise ConfigError("--resume", expected="a run that writes one file", found="one of several", next_step=step)
    with TrainingDisplay() as display:
        if "patterns" in settings:
            configs = patterns_from(settings, where)
            outputs, written = [config.output for config in configs], train_mixture(configs, display)
        else:
            shared, tasks = runs_from(settings, where)
            outputs = [shared.output, *(task.output for task in tasks)]
            written = train_together(shared, tasks, display)
    for output, prefix in zip(outputs, written, strict=True):
        _print_result(output, dict(prefix.manifest.provenance.metrics), prefix.manifest.content, as_json)


def _print_result(output: str, metrics: dict[str, float], content: str | None, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"version": 1, "output": output, "metrics": metrics, "content": content}, sort_keys=True))
        return
    told = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in metrics.items())
    typer.echo(f"wrote {output} ({told})")
    typer.echo(f"next: prefixkit inspect {shlex.quote(output)}")
