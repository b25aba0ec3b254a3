"""Adapters that users put into a genai folder: they stay when it is exported again, or it is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from prefixkit.errors import InputError

SUFFIX = ".onnx_adapter"


def others(folder: Path, own: str, version: int, dtype: str) -> list[Path]:
    """The adapters in `folder`, if it exists, besides that named `own`: all for the model `version` in `dtype`.

    Raises InputError for anything else in there, which the next export would not serve and could only delete.
    """
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    kept = [path for path in found if path.name != f"{own}{SUFFIX}"]
    for path in kept:
        is_for = _made_for(path)
        if is_for != (version, [dtype]):
            told = "another file" if is_for is None else f"one for {is_for[0]} in {' and '.join(is_for[1])}"
            expected = f"an adapter for model version {version} in {dtype}, which stays"
            raise InputError(path, expected=expected, found=told, next_step="move it away, or choose another folder")
    return kept


def _made_for(path: Path) -> tuple[int, Sequence[str]] | None:
    """The version of its model and the dtypes of its tensors; None for what is no adapter."""
    try:
        adapter = onnxruntime.AdapterFormat.read_adapter(str(path))
    except Exception:  # ONNX Runtime has no narrower class for a file that is none
        return None
    dtypes = {str(value.numpy().dtype) for value in adapter.get_parameters().values()}
    return adapter.get_model_version(), sorted(dtypes)
