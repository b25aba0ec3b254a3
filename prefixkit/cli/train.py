"""`prefixkit train`: a prefix from a backbone and data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixkit.errors import ConfigError

_SECTIONS = {
    "backbone": "backbone",
    "data": "data",
    "eval_data": "eval_data",
    "output": "output",
    "task": "task",
    "steps": "steps",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "seed": "seed",
    "device": "device",
    "dtype": "dtype",
    "method": "method.name",
    "length": "method.length",
    "init": "method.init",
    "lr": "optimizer.lr",
}


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("train", no_args_is_help=True)(train)


def train(
    backbone: Annotated[str | None, typer.Option(help="Folder or hub id of the frozen model.")] = None,
    method: Annotated[str | None, typer.Option(help="What to train; `prefixkit methods` lists them.")] = None,
    data: Annotated[str | None, typer.Option(help="Training examples: JSONL or E2E lines.")] = None,
    output: Annotated[str | None, typer.Option("--output", "-o", help="The prefix file to write.")] = None,
    eval_data: Annotated[str | None, typer.Option(help="Validation examples; the best validation is kept.")] = None,
    task: Annotated[str | None, typer.Option(help="text, continuation, e2e, chat or a TOML file.")] = None,
    length: Annotated[
        int | None, typer.Option(help="Prefix slots or prompt vectors; of a task with {slot}, as many as it has. [16]")
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="The start; `prefixkit methods` lists each method's. [its first]")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="0 writes the initial prefix. [one epoch, at least 500]")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data, instead of --steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate. [the method's own]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step. [16]")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal files. [0]")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda. [auto]")] = None,
    dtype: Annotated[str | None, typer.Option(help="What the backbone computes in. [float32]")] = None,
    config: Annotated[Path | None, typer.Option(help="Settings from a TOML file; flags override it.")] = None,
    assignments: Annotated[list[str] | None, typer.Option("--set", help="Any setting, as a.b=c. Repeatable.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where an interrupted run stopped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a prefix against a frozen backbone and write it as one file."""
    given = {name: value for name, value in locals().items() if name in _SECTIONS and value is not None}
    settings = _settings(config, given, assignments or [])
    from prefixkit.cli.training_display import TrainingDisplay, quiet_transformers
    from prefixkit.training.config import from_mapping
    from prefixkit.training.loop import train as run

    quiet_transformers()
    if "tasks" in settings or "patterns" in settings:
        _train_several(settings, str(config), resume, as_json)
        return
    run_config = from_mapping(settings, str(config) if config is not None else "train")
    with TrainingDisplay() as display:
        prefix = run(run_config, resume=resume, listener=display)
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


def _settings(config: Path | None, given: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    from prefixkit.training.config import override, read_toml

    settings = read_toml(config) if config is not None else {}
    for name, value in given.items():
        *sections, key = _SECTIONS[name].split(".")
        inside = settings
        for section in sections:
            inside = inside.setdefault(section, {})
        if not isinstance(inside, dict):
            raise ConfigError(str(config), expected=f"a section [{sections[0]}]", found="a single value")
        inside[key] = value
    for assignment in assignments:
        override(settings, assignment)
    return settings


def _print_result(output: str, metrics: dict[str, float], content: str | None, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"version": 1, "output": output, "metrics": metrics, "content": content}, sort_keys=True))
        return
    told = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in metrics.items())
    typer.echo(f"wrote {output} ({told})")
    typer.echo(f"next: prefixkit inspect {output}")
