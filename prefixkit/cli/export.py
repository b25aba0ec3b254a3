"""`prefixkit export`: a prefix, or what was exported before, in the form that another runtime loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixkit.errors import ConfigError

if TYPE_CHECKING:
    from prefixkit.export.onnx import Exported


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("export", no_args_is_help=True)(export)


def export(
    prefix: Annotated[
        Path | None,
        typer.Argument(help="The prefix file, or a folder for --triton. Without one, the bare model."),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="A folder for onnxruntime: the model's graph and the prefix.")
    ] = False,
    peft: Annotated[bool, typer.Option("--peft", help="A folder for PEFT: the prefix alone.")] = False,
    triton: Annotated[
        bool, typer.Option("--triton", help="A Triton model repository, of a folder that --onnx wrote.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to write.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Folder or hub id of the model that the prefix is for.")] = None,
    target: Annotated[
        str,
        typer.Option(help="portable: one graph that every ONNX runtime knows; cuda: graphs for `prefixkit serve`."),
    ] = "portable",
    dtype: Annotated[str, typer.Option(help="float32 or float16; bfloat16 for --target cuda.")] = "float32",
    baked: Annotated[bool, typer.Option("--baked", help="Put the prefix into the graph, for any runtime.")] = False,
    weights: Annotated[
        str | None,
        typer.Option(help="external: model.onnx.data; checkpoint: the model's own safetensors; inline: model.onnx."),
    ] = None,
    allow_mismatch: Annotated[bool, typer.Option("--allow-mismatch", help="Take a prefix for other weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Export a prefix and, for ONNX, its backbone; done only if it computes what PyTorch computes."""
    if onnx + peft + triton != 1:
        found, step = ("none", "one", "two", "three")[onnx + peft + triton], "add --onnx, --peft or --triton"
        raise ConfigError("export", expected="a form to export to", found=found, next_step=step)
    if peft or triton:
        (_peft if peft else _triton)(prefix, output)
        return
    if output is None or backbone is None:
        missing = "--output" if output is None else "--backbone"
        raise ConfigError("export --onnx", expected=missing, found="none", next_step="see `prefixkit export --help`")
    options = {"dtype": dtype, "target": target, "baked": baked, "weights": weights, "allow_mismatch": allow_mismatch}
    _show(_onnx(prefix, backbone, output, options), as_json)


def _peft(prefix: Path | None, output: Path | None) -> None:
    from prefixkit.bridges.peft import export_peft
    from prefixkit.prefix import load

    if prefix is None or output is None:
        missing = "a prefix file" if prefix is None else "--output"
        raise ConfigError("export --peft", expected=missing, found="none", next_step="see `prefixkit export --help`")
    export_peft(load(prefix), output)
    typer.echo(f"wrote {output}")
    typer.echo(f'next: PeftModel.from_pretrained(model, "{output}")')


def _triton(folder: Path | None, output: Path | None) -> None:
    from prefixkit.export.triton import write_triton

    if folder is None or output is None:
        missing = "a folder that --onnx wrote" if folder is None else "--output"
        raise ConfigError("export --triton", expected=missing, found="none", next_step="see `prefixkit export --help`")
    models = write_triton(folder, output)
    typer.echo(f"wrote {output}: {', '.join(model.name for model in models)}")
    typer.echo(f"next: {output}/README.md, and tritonserver --model-repository={output}")


def _onnx(prefix: Path | None, backbone: str, output: Path, options: dict[str, Any]) -> Exported:
    from prefixkit.cli.training_display import quiet_transformers
    from prefixkit.export.onnx import export_onnx

    quiet_transformers()
    if prefix is not None:
        _tell_rounded(prefix)
    return export_onnx(prefix, backbone, output, **options, progress=lambda stage: typer.echo(f"{stage} …", err=True))


def _tell_rounded(prefix: Path) -> None:
    """Say so where the prefix learned beside other numbers than the graph will hold."""
    from prefixkit.prefix import load

    kind = load(prefix).manifest.provenance.config.get("quantize")
    if kind is not None:
        told = f"it was trained on a backbone of {kind} weights, and the graph has those of the folder: compare with"
        typer.echo(f"{prefix}: {told} `prefixkit eval`, with and without --quantize {kind}", err=True)


def _show(exported: Exported, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_document(exported), sort_keys=True))
        return
    for case in exported.cases:
        effect = "" if case.effect is None else f", effect of the prefix {case.effect:.3g}"
        typer.echo(f"{case.name}: max |d| {case.max_abs_difference:.1e} (at most {case.tolerance:.1e}){effect}")
    typer.echo(f"wrote {exported.folder} ({exported.bytes:,} bytes in {sum(exported.seconds.values()):.0f} s)")
    typer.echo(f"next: {_next(exported.folder)}")


def _next(folder: Path) -> str:
    from prefixkit.serving.report import read_report

    report = read_report(folder)
    if report.reader is not None:
        return f'prefixkit.serving.reader.Reader("{folder}") in Python'
    if report.buffered is not None:
        return f"prefixkit serve {folder}"
    return f'prefixkit generate {folder} --prompt "…"'


def _document(exported: Exported) -> dict[str, Any]:
    return {
        "version": 1,
        "output": str(exported.folder),
        "bytes": exported.bytes,
        "max_abs_difference": exported.max_abs_difference,
        "parity": [{**vars(case), "rows": list(case.rows)} for case in exported.cases],
        "seconds": dict(exported.seconds),
    }
