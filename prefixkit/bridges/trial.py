"""A small batch that a folder is tried with before it is there, against a graph that was compared with PyTorch."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from prefixkit.errors import ParityError
from prefixkit.prefix import Array
from prefixkit.serving.report import INPUTS, OUTPUTS

TOLERANCE = 1e-3
"""Of a logit; more only where float32 does not resolve it: a hundred-thousandth of the largest."""
ROWS = 2
_SEQ = 4


def session(graph: Path) -> Any:
    """`graph` in ONNX Runtime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Not the warning for each input that has a default.
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def logits(session: Any, tensors: Mapping[str, Array], past: int) -> Array:
    """Logits [rows, seq, vocab] of the batch behind a past of that length; `tensors` are past and prefix."""
    taken = text(past, {value.name for value in session.get_inputs()})
    found: Array = session.run([OUTPUTS["logits"]], {**taken, **tensors})[0]
    return found


def text(past: int, inputs: Collection[str]) -> dict[str, Array]:
    """The batch for a graph with these `inputs`, behind a past of that length."""
    mask = _real().astype(np.int64)
    feeds = {
        INPUTS["input_ids"]: np.arange(1, 1 + mask.size).reshape(mask.shape) % 7,
        INPUTS["attention_mask"]: np.concatenate([np.ones((ROWS, past), np.int64), mask], axis=1),
        INPUTS["position_ids"]: (mask.cumsum(1) - 1 + past) * mask,
    }
    return {name: array for name, array in feeds.items() if name in inputs}


def as_past(pairs: list[tuple[Array, Array]], dtype: str = "float32") -> dict[str, Array]:
    """Key and value [kv_heads, prefix, head_dim] of each layer as the past of every row."""
    names = [INPUTS[f"past_{role}_names"] % layer for layer in range(len(pairs)) for role in ("key", "value")]
    arrays = (array.astype(np.float32).astype(dtype) for pair in pairs for array in pair)
    return {name: np.stack([array] * ROWS) for name, array in zip(names, arrays, strict=True)}


def refuse_difference(where: str, found: Array, expected: Array, what: str) -> None:
    """Raise ParityError where logits of real tokens differ by more than `TOLERANCE`."""
    apart = float(np.abs(found - expected)[_real()].max())
    allowed = max(TOLERANCE, 1e-5 * float(np.abs(expected[_real()]).max()))
    # Not-a-number is no number that is small enough.
    if not apart <= allowed:
        raise ParityError(
            where,
            expected=f"logits of {what} within {allowed:.1e} of those of the ONNX graph",
            found=f"a difference of {apart:.1e}, so nothing was written",
            next_step="report it with the model's name: this architecture is carried over wrongly",
        )


def _real() -> Array:
    """The mask of the text: the last row is padded on the left."""
    mask = np.ones((ROWS, _SEQ), dtype=bool)
    mask[-1, 0] = False
    return mask
