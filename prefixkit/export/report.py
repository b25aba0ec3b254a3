"""The document in `export.json`: what another program needs to run the graph, and how it was made and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prefixkit import __version__
from prefixkit.export.parity import CaseResult
from prefixkit.export.tracing import OPSET
from prefixkit.format.manifest import BackboneIdentity, document
from prefixkit.prefix import Prefix
from prefixkit.serving.graph_files import listed
from prefixkit.serving.report import VERSION

GRAPH = "onnx/model.onnx"
PREFIX = "prefix.safetensors"
_PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "numpy")


def report_document(
    folder: Path,
    backbone: BackboneIdentity,
    prefix: Prefix | None,
    parts: Mapping[str, Any],
    *,
    dtype: str,
    baked: bool,
    weights: str,
) -> dict[str, Any]:
    """Everything but what verification adds, of the graphs that lie in `folder`.

    Args:
        parts: what is said of graphs of this kind alone.
    """
    common = {"opset": OPSET, "dtype": dtype, "logits_dtype": "float32", "weights": weights}
    files = [asdict(file) for file in listed(folder, folder / parts["graph"]["file"])]
    return {
        "version": VERSION,
        "prefixkit": __version__,
        "target": "portable",
        "backbone": document(backbone),
        "prefix": None if prefix is None else _prefix(prefix, baked),
        "versions": {**{name: version(name) for name in _PACKAGES}, "onnxruntime": _onnxruntime()},
        **parts,
        "graph": {**common, **parts["graph"], "files": files},
    }


def with_results(draft: Mapping[str, Any], cases: Sequence[CaseResult], seconds: Mapping[str, float]) -> dict[str, Any]:
    """The whole document: `draft`, parity by case, and what each stage took."""
    return {**draft, "parity": [asdict(case) for case in cases], "seconds": dict(seconds)}


def _prefix(prefix: Prefix, baked: bool) -> dict[str, Any]:
    return {"file": None if baked else PREFIX, "baked": baked, "manifest": document(prefix.manifest)}


def _onnxruntime() -> str:
    # Two distributions bring the same module.
    import onnxruntime

    return str(onnxruntime.__version__)
