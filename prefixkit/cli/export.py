"""`prefixkit export`: a prefix, or what was exported before, in the form that another runtime loads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixkit.bridges.catalogue import runtime
from prefixkit.cli.carry import carry, options_of
from prefixkit.cli.runtime_flags import one_of, with_flags
from prefixkit.errors import ConfigError

if TYPE_CHECKING:
    from prefixkit.bridges.carried import Carried
    from prefixkit.export.onnx import Exported


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command("export", no_args_is_help=True)(export)


@with_flags("writes")
def export(
    prefix: Annotated[
        Path | None,
        typer.Argument(help="The prefix file, or a folder for --triton. For --onnx none is the bare model."),
    ] = None,
    onnx: Annotated[
        bool, typer.Option("--onnx", help="A folder for onnxruntime: the model's graph and the prefix.")
    ] = False,
    triton: Annotated[
        bool, typer.Option("--triton", help="A Triton model repository, of a folder that --onnx wrote.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The file or folder to write.")] = None,
    backbone: Annotated[str | None, typer.Option(help="Folder or hub id of the model that the prefix is for.")] = None,
    target: Annotated[
        str | None,
        typer.Option(help="portable, the default: one graph for every ONNX runtime; cuda: graphs for `serve`."),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Of --onnx: float32, the default, or float16; bfloat16 for --target cuda. See `runtimes`."),
    ] = None,
    baked: Annotated[bool, typer.Option("--baked", help="Put the prefix into the graph, for any runtime.")] = False,
    weights: Annotated[
        str | None,
        typer.Option(help="external: model.onnx.data; checkpoint: the model's own safetensors; inline: model.onnx."),
    ] = None,
    quantize: Annotated[
        str | None, typer.Option(help="int4 or int8: weights of linear layers, for --target cuda.")
    ] = None,
    kv_cache: Annotated[
        str | None, typer.Option("--kv-cache", help="int8: keys and values of eight bits, for --target cuda.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A setting of the runtime, as a=b; see `runtimes`. Repeatable.")
    ] = None,
    allow_mismatch: Annotated[bool, typer.Option("--allow-mismatch", help="Take a prefix for other weights.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    **runtimes: bool,
) -> None:
    """Export a prefix and, for ONNX, its backbone; done only if it computes what PyTorch computes."""
    form = one_of("export", {"onnx": onnx, "triton": triton, **runtimes}, "a form to export to")
    graph = {"target": target, "dtype": dtype, "baked": baked, "weights": weights, "quantize": quantize}
    graph["kv-cache"] = kv_cache
    given = {**graph, "allow-mismatch": allow_mismatch, "backbone": backbone, "set": settings, "json": as_json}
    given = {name: value for name, value in given.items() if value}
    _refuse_without_effect(form, given)
    if form == "onnx":
        options = {"dtype": dtype or "float32", "target": target or "portable", "baked": baked, "weights": weights}
        options |= {"quantize": quantize, "kv_cache": kv_cache, "allow_mismatch": allow_mismatch}
        written, source = _required(form, {"--output": output, "--backbone": backbone})
        _show(_onnx(prefix, source, written, options), as_json)
    elif form == "triton":
        folder, written = _required(form, {"a folder that --onnx wrote": prefix, "--output": output})
        _triton(folder, written, as_json)
    else:
        row = runtime(form)
        needed = {"a prefix file": prefix, "--output": output} | ({"--backbone": backbone} if row.backbone else {})
        file, written, *_ = _required(form, needed)
        _show_carried(carry(row, file, written, backbone, settings or (), dtype), as_json)


_OPTIONS: Mapping[str, set[str]] = {
    "onnx": {"target", "dtype", "baked", "weights", "quantize", "kv-cache", "allow-mismatch", "backbone", "json"},
    "triton": {"json"},
}
"""What has an effect, by form; for those of the catalogue, its rows say so."""


def _refuse_without_effect(form: str, given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name not in (_OPTIONS[form] if form in _OPTIONS else options_of(runtime(form))):
            found = ", ".join(value) if isinstance(value, list) else str(value)
            step = "leave it out; see `prefixkit runtimes`"
            raise ConfigError(f"export --{form}", expected=f"no --{name}", found=found, next_step=step)


def _required(form: str, values: Mapping[str, Any]) -> Iterator[Any]:
    """The values, in order. Raises ConfigError for one that was not given."""
    for name, value in values.items():
        if value is None:
            step = "see `prefixkit export --help`"
            raise ConfigError(f"export --{form}", expected=name, found="none", next_step=step)
        yield value


def _show_carried(done: Carried, as_json: bool) -> None:
    if as_json:
        document = {"version": 1, "output": str(done.output), "lost": list(done.lost), "next": done.next}
        typer.echo(json.dumps(document, sort_keys=True))
        return
    for sentence in done.lost:
        typer.echo(f"warning: {sentence}", err=True)
    typer.echo(f"wrote {done.output}")
    typer.echo(f"next: {done.next}")


def _triton(folder: Path, output: Path, as_json: bool) -> None:
    from prefixkit.export.triton import write_triton

    models = [model.name for model in write_triton(folder, output)]
    if as_json:
        typer.echo(json.dumps({"version": 1, "output": str(output), "models": models}, sort_keys=True))
        return
    typer.echo(f"wrote {output}: {', '.join(models)}")
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
