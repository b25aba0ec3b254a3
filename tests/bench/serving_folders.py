"""The backbone of a serving case and its exports: made once, in a folder that the cases share."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prefixkit.errors import PrefixkitError
from prefixkit.export.onnx import export_onnx
from tests.bench.serving_work import Tell
from tests.bench.shapes import make_backbone


def backbone(name: str, shape: Mapping[str, Any], folder: Path, dtype: str, device: str, tell: Tell) -> Path:
    """Random weights of `shape`, in `dtype`."""
    made = folder / f"{name}-{dtype}" / "backbone"
    if not (made / "config.json").exists():
        tell(f"{name}: random weights in {dtype} …")
        make_backbone(shape, made, dtype, device=device)
        torch.cuda.empty_cache()
    return made


def exports(source: Path, folder: Path, dtype: str, tell: Tell) -> tuple[str, str]:
    """`source` for buffers and as one portable graph, in `folder`; the latter is "" where there is none in `dtype`."""
    folder.mkdir(parents=True, exist_ok=True)
    buffered, portable = folder / "buffered", folder / "portable"
    _export(source, buffered, "cuda", dtype, tell)
    try:
        _export(source, portable, "portable", dtype, tell)
    except PrefixkitError as error:
        tell(f"no portable graph: {error}")
    return str(buffered), str(portable) if portable.exists() else ""


def _export(source: Path, made: Path, target: Any, dtype: Any, tell: Tell) -> None:
    if not made.exists():
        began = time.perf_counter()
        export_onnx(None, source, made, dtype=dtype, target=target)
        tell(f"{made.parent.name}: exported for {target} in {time.perf_counter() - began:.0f} s")
