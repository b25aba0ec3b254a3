"""`prefixkit quickstart`: train, inspect, export and generate, offline, on what the package brings along."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixkit.errors import ConfigError

if TYPE_CHECKING:
    from prefixkit.export.onnx import Exported

STEPS = 300
LR = 0.15
"""Higher than the default: a run this short has no time for a lower one."""
_FOLDER = Path("prefixkit-quickstart")
_MAX_NEW_TOKENS = 80
_SHOWN = 3


@dataclass
class _Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, told: str) -> Iterator[None]:
        typer.secho(f"\n{len(self.seconds) + 1}. {told}", bold=True, err=True)
        began = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - began, 1)


@dataclass(frozen=True)
class _Texts:
    """What was written for the test inputs, and what people wrote."""

    inputs: list[str]
    references: list[tuple[str, ...]]
    with_prefix: list[str]
    bare: list[str]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("quickstart")(quickstart)


def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = _FOLDER,
    steps: Annotated[int, typer.Option(min=0, help="Training steps.")] = STEPS,
    seed: Annotated[int, typer.Option(min=0, help="Equal seeds give equal files.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Teach a small frozen model to describe restaurants, and serve it without PyTorch. Offline, about two minutes."""
    from prefixkit.cli.training_display import quiet_transformers

    _make_folder(output)
    quiet_transformers()
    clock = _Clock()
    prefix, served = output / "restaurants.safetensors", output / "served"
    with clock.stage("train", f"Training a prefix against a frozen model: {steps} steps on restaurant data"):
        _train(prefix, steps, seed)
    with clock.stage("inspect", f"What {prefix} says of itself"):
        _inspect(prefix, quiet=as_json)
    with clock.stage("export", "Exporting model and prefix as ONNX, compared with PyTorch before it is kept"):
        exported = _export(prefix, served)
    with clock.stage("generate", "Writing with onnxruntime, with the prefix and without"):
        texts = _generate(served)
    figures = _figures(texts, exported, clock.seconds)
    if as_json:
        typer.echo(json.dumps({"version": 1, **figures}, sort_keys=True))
    else:
        _show(texts, figures, prefix, served)


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(path, expected="a folder that can be made", found=error.strerror or str(error)) from error


def _train(prefix: Path, steps: int, seed: int) -> None:
    from prefixkit.cli.training_display import TrainingDisplay
    from prefixkit.quickstart import BACKBONE, E2E
    from prefixkit.training.config import from_mapping
    from prefixkit.training.loop import train

    settings = {
        "backbone": str(BACKBONE),
        "data": str(E2E / "train.jsonl.gz"),
        "eval_data": str(E2E / "valid.jsonl"),
        "output": str(prefix),
        "task": "e2e",
        "steps": steps,
        "seed": seed,
        "optimizer": {"lr": LR},
        "evaluation": {"every": max(1, steps // 4), "limit": 128},
    }
    with TrainingDisplay() as display:
        train(from_mapping(settings), listener=display)


def _inspect(prefix: Path, *, quiet: bool) -> None:
    from prefixkit.cli.inspect import inspect
    from prefixkit.quickstart import BACKBONE

    if not quiet:
        inspect(prefix, as_json=False, backbone=BACKBONE)


def _export(prefix: Path, served: Path) -> Exported:
    from prefixkit.export.onnx import export_onnx
    from prefixkit.quickstart import BACKBONE

    exported = export_onnx(prefix, BACKBONE, served, progress=lambda stage: typer.echo(f"   {stage}", err=True))
    effect = max(case.effect or 0.0 for case in exported.cases)
    typer.echo(
        f"   logits differ from PyTorch's by {exported.max_abs_difference:.1e} at most; "
        f"the prefix moves them by up to {effect:.1f}",
        err=True,
    )
    return exported


def _generate(served: Path) -> _Texts:
    from prefixkit.data.readers import read_examples
    from prefixkit.data.references import group_references
    from prefixkit.quickstart import E2E
    from prefixkit.serving.session import OWN, Session

    groups = group_references(read_examples(E2E / "test.jsonl"))
    session = Session(served)
    inputs = [str(group.fields["input"]) for group in groups]
    with_prefix, bare = (session.generate(inputs, name, max_new_tokens=_MAX_NEW_TOKENS) for name in (OWN, None))
    return _Texts(
        inputs,
        [group.references for group in groups],
        with_prefix=[one.text for one in with_prefix],
        bare=[one.text for one in bare],
    )


def _figures(texts: _Texts, exported: Exported, seconds: dict[str, float]) -> dict[str, Any]:
    from prefixkit.training.metrics.bleu import bleu

    return {
        "inputs": len(texts.inputs),
        "bleu_with_prefix": round(bleu(texts.with_prefix, texts.references), 2),
        "bleu_without": round(bleu(texts.bare, texts.references), 2),
        "max_abs_difference": exported.max_abs_difference,
        "seconds": seconds,
    }


def _show(texts: _Texts, figures: dict[str, Any], prefix: Path, served: Path) -> None:
    from prefixkit.cli.render import plain

    typer.echo("")
    apart = len(texts.inputs) // _SHOWN
    for index in range(apart // 2, len(texts.inputs), apart)[:_SHOWN]:
        rows = [
            ("input", texts.inputs[index]),
            ("prefix", texts.with_prefix[index]),
            ("no prefix", " ".join(texts.bare[index].split())[:160]),
            ("a person", texts.references[index][0].strip()),
        ]
        typer.echo(plain([(f"test input {index + 1}", rows)]) + "\n")
    seconds = ", ".join(f"{stage} {took:g}" for stage, took in figures["seconds"].items())
    rows = [
        ("BLEU", f"{figures['bleu_with_prefix']:.1f} with the prefix, {figures['bleu_without']:.1f} without"),
        ("parity", f"{figures['max_abs_difference']:.1e} from PyTorch at most"),
        ("seconds", f"{seconds}; {sum(figures['seconds'].values()):.0f} in all"),
    ]
    typer.echo(plain([(f"{figures['inputs']} test inputs that training did not see", rows)]))
    typer.echo(
        f"""
next
  prefixkit inspect {prefix}
  prefixkit generate {served} --prompt "name : Blue Spice | Type : pub | area : riverside | price : cheap"
  prefixkit generate {served} --no-prefix --prompt "name : Blue Spice | Type : pub"
  prefixkit train --help"""
    )
