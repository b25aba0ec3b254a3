"""`write_triton`: an exported folder as a model repository of Triton, for its ONNX Runtime backend."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from prefixkit import __version__
from prefixkit.errors import ConfigError
from prefixkit.export.triton_config import config_of
from prefixkit.export.triton_readme import readme
from prefixkit.export.weights import beside
from prefixkit.format.atomic import replacing_folder
from prefixkit.serving.graph_files import check_files
from prefixkit.serving.report import VERSION, ExportedFolder, read_report

MARKER = "triton.json"
"""By which a repository of ours is known. Triton looks at folders alone."""


@dataclass(frozen=True)
class TritonModel:
    """A model of a repository.

    Attributes:
        name: what requests call it, and its folder.
        role: `model`, or which of several: `prompts`, `decode` and `place`, or `encoder` and `decoder`.
        file: its graph in the exported folder.
    """

    name: str
    role: str
    file: str


def write_triton(folder: str | Path, repository: str | Path) -> tuple[TritonModel, ...]:
    """Write the graphs in `folder`, which `export_onnx` wrote, as models of Triton.

    Each becomes `NAME/config.pbtxt` and `NAME/1/model.onnx` with its weights beside it: the same file under another
    name where the file system can, else one copy for all of them.

    Args:
        repository: a new folder, an empty one, or one that this function wrote, which is replaced.

    Raises:
        InputError: no such exported folder, or a damaged one; a repository that cannot be written, or holds other
            files; an element type that Triton's backend does not take. Nothing half-written stays.
    """
    report = read_report(folder)
    check_files(report.folder, report.files)
    if report.buffered is not None and report.buffered.scales is not None:
        expected, found = "keys and values in the graph's dtype", "eight bits, to which a client would have to round"
        raise ConfigError(str(folder), expected=expected, found=found, next_step="export without --kv-cache")
    models = _models(report)
    with replacing_folder(repository, marker=MARKER) as made:
        written: dict[Path, Path] = {}
        graphs = {model.name: _write(model, report, made, written) for model in models}
        opset = max(graph.opset_imports[""] for graph in graphs.values())
        (made / "README.md").write_text(readme(report, {one.role: one.name for one in models}, opset), encoding="utf-8")
        document = {"version": 1, "prefixkit": __version__, "models": {one.role: one.name for one in models}}
        (made / MARKER).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return models


def _models(report: ExportedFolder) -> tuple[TritonModel, ...]:
    roles = {"model": report.graph}
    if report.buffered is not None:
        roles = {"prompts": report.graph, "decode": report.buffered.decode, "place": report.buffered.place}
    elif report.encoder is not None:
        roles = {"encoder": report.encoder, "decoder": report.graph}
    # What a folder, a URL and protobuf can all hold.
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(report.backbone.name).name).strip(".") or "model"
    return tuple(TritonModel(name if role == "model" else f"{name}-{role}", role, file) for role, file in roles.items())


def _write(model: TritonModel, report: ExportedFolder, repository: Path, written: dict[Path, Path]) -> ir.Model:
    """Write one model.

    Args:
        written: where files are that other models of the repository have brought.
    """
    source, version = report.folder / model.file, repository / model.name / "1"
    version.mkdir(parents=True)
    graph = ir.load(source)
    beside(source, version).rename(version / "model.onnx")
    for file in sorted(_external(graph.graph)):
        original = source.parent / file
        written[original] = beside(written.get(original, original), version)
    config = config_of(model.name, graph.graph, _parameters(model, report))
    (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")
    return graph


def _external(graph: ir.Graph) -> set[str]:
    """The files, beside the graph, in which its weights are."""
    tensors = (value.const_value for value in graph.initializers.values())
    return {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}


def _parameters(model: TritonModel, report: ExportedFolder) -> Mapping[str, str]:
    """What a client compares before it sends a prefix: it fits the backbone of these hashes alone."""
    backbone = report.backbone
    said = {
        "version": __version__,
        "schema": str(VERSION),
        "role": model.role,
        "dtype": report.dtype,
        "backbone": backbone.name,
        "backbone_config_hash": backbone.config_hash,
        "backbone_weights_hash": backbone.weights_hash,
        "tokenizer_hash": backbone.tokenizer_hash,
        "baked_prefix": report.prefix.content if report.baked and report.prefix is not None else None,
    }
    return {f"prefixkit.{key}": value for key, value in said.items() if value is not None}
