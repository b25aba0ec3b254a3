"""`prefixkit sweep`: many prefixes against one backbone, side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixkit.cli import run_options as options
from prefixkit.errors import ConfigError


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
    quantize: options.Quantize = None,
    gradient_checkpointing: options.Checkpointing = None,
    compile: options.Compile = None,
    config: options.Config = None,
    assignments: options.Assignments = None,
    halving: Annotated[
        bool, typer.Option("--halving", help="Drop the worse half again and again; the better gets its batches.")
    ] = False,
    study: Annotated[
        str | None, typer.Option(help="A database, as sqlite:///study.db: machines share its trials, one worker each.")
    ] = None,
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
    if study is not None:
        _share(settings, axes(grid), output, study, halving, resume)
        _print_study(output, as_json)
        return
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


def _share(
    settings: dict[str, Any], grid: dict[str, list[Any]], output: Path, study: str, halving: bool, resume: bool
) -> None:
    from prefixkit.cli.training_display import TrainingDisplay
    from prefixkit.training.study import work

    if resume:
        step = "leave --resume out: the same command goes on with the study"
        raise ConfigError("--resume", expected="a sweep of one worker", found="--study", next_step=step)
    with TrainingDisplay() as display:
        trials = work(settings, grid, output, study, halving=halving, listener=display)
    if trials and not any(trial["status"] in ("finished", "dropped") for trial in trials):
        step = "see what its workers said, and use another --output for a new one"
        raise ConfigError(study, expected="a trial that finished", found="none", next_step=step)


def _print_study(output: Path, as_json: bool) -> None:
    from prefixkit.training.sweep import BEST
    from prefixkit.training.trials import RESULTS

    stored = json.loads((output / RESULTS).read_text(encoding="utf-8"))
    if as_json:
        typer.echo(json.dumps(stored, sort_keys=True))
        return
    for trial in stored["trials"]:
        told = ", ".join(f"{key} {value}" for key, value in trial["settings"].items())
        loss = trial["validation_loss"]
        ended = trial["status"] if loss is None else f"validation loss {loss:.4f}"
        typer.echo(f"trial {trial['trial']}: {told}; {ended}")
    if stored["best"] is not None:
        typer.echo(f"wrote {output / BEST} (trial {stored['best']})")
