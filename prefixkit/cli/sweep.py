"""`prefixkit sweep`: many prefixes against one backbone, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from prefixkit.cli import run_options as options


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("sweep", no_args_is_help=True)(sweep)


def sweep(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for the files and their table.")],
    grid: Annotated[list[str], typer.Option(help="A setting and its values, as optimizer.lr=0.03,0.1. Repeatable.")],
    backbone: options.Backbone = None,
    method: options.Method = None,
    data: options.Data = None,
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
    compile: options.Compile = None,
    config: options.Config = None,
    assignments: options.Assignments = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="Drop the worse half again and again; the better gets its batches.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue where an interrupted sweep stopped.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Train every combination of some settings at once, and keep the best."""
    given = {name: value for name, value in locals().items() if name != "output"}
    settings = options.settings_of(config, given, assignments)
    from prefixkit.cli.sweep_display import SweepDisplay
    from prefixkit.cli.training_display import quiet_transformers
    from prefixkit.training.grid import axes
    from prefixkit.training.sweep import BEST
    from prefixkit.training.sweep import sweep as run
    from prefixkit.training.trials import RESULTS, best_of

    quiet_transformers()
    with SweepDisplay() as display:
        trials = run(settings, axes(grid), output, halving=halving, resume=resume, listener=display)
    best = best_of(trials)
    if as_json:
        typer.echo(json.dumps(json.loads((output / RESULTS).read_text(encoding="utf-8")), sort_keys=True))
        return
    display.table_of(trials)
    if best is not None:
        told = ", ".join(f"{key} {value}" for key, value in best.point.items())
        typer.echo(f"wrote {output / BEST} (trial {best.number}: {told}; validation loss {best.state.best_loss:.4f})")
