"""The options of a training run, as `train` and `sweep` have them, and the settings that they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from prefixkit.errors import ConfigError

Backbone = Annotated[str | None, typer.Option(help="Folder or hub id of the frozen model.")]
Method = Annotated[str | None, typer.Option(help="What to train; `prefixkit methods` lists them.")]
Data = Annotated[str | None, typer.Option(help="Training examples: JSONL, E2E lines, or images as .npz or folders.")]
EvalData = Annotated[str | None, typer.Option(help="Validation examples; the best validation is kept.")]
Task = Annotated[
    str | None,
    typer.Option(help="A ready-made task, such as text, chat, classification or tagging, or a TOML file. [text]"),
]
Length = Annotated[
    int | None, typer.Option(help="Prefix slots or prompt vectors; of a task with {slot}, as many as it has. [16]")
]
Init = Annotated[str | None, typer.Option(help="The start; `prefixkit methods` lists each method's. [its first]")]
Steps = Annotated[int | None, typer.Option(help="0 writes the initial prefix. [one epoch, at least 500]")]
Epochs = Annotated[float | None, typer.Option(help="Passes over the data, instead of --steps.")]
Rate = Annotated[float | None, typer.Option(help="Peak learning rate. [the method's own]")]
BatchSize = Annotated[int | None, typer.Option(help="Examples a step. [16]")]
Seed = Annotated[int | None, typer.Option(help="Equal seeds give equal files. [0]")]
Device = Annotated[str | None, typer.Option(help="auto, cpu or cuda. [auto]")]
Dtype = Annotated[str | None, typer.Option(help="What the backbone computes in. [float32]")]
Quantize = Annotated[str | None, typer.Option(help="nf4: the backbone's linear layers in four bits a weight.")]
Checkpointing = Annotated[
    bool | None,
    typer.Option("--gradient-checkpointing", help="Compute layers again in the backward pass, to save memory."),
]
Compile = Annotated[str | None, typer.Option(help="torch.compile: auto, on or off. [auto]")]
Config = Annotated[Path | None, typer.Option(help="Settings from a TOML file; flags override it.")]
Assignments = Annotated[list[str] | None, typer.Option("--set", help="Any setting, as a.b=c. Repeatable.")]

SECTIONS = {
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
    "quantize": "quantize",
    "gradient_checkpointing": "gradient_checkpointing",
    "compile": "compile",
    "method": "method.name",
    "length": "method.length",
    "init": "method.init",
    "lr": "optimizer.lr",
}
"""Which setting each option is."""


def settings_of(config: Path | None, options: Mapping[str, Any], assignments: list[str] | None) -> dict[str, Any]:
    """The nested settings of a run: those of a TOML file, then `options`, then `--set`. Raises ConfigError."""
    from prefixkit.training.config import assign, read_toml

    settings = read_toml(config) if config is not None else {}
    for name in SECTIONS:
        if options.get(name) is None:
            continue
        *sections, key = SECTIONS[name].split(".")
        inside = settings
        for section in sections:
            inside = inside.setdefault(section, {})
        if not isinstance(inside, dict):
            raise ConfigError(str(config), expected=f"a section [{sections[0]}]", found="a single value")
        inside[key] = options[name]
    for assignment in assignments or []:
        assign(settings, assignment)
    return settings
