"""Verification of an exported folder: the batches that must agree with PyTorch before an export is done.

The folder is loaded as it will be served, by serving's own runtime, with the prefix read back from its file.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from prefixkit.backbones.decoder import Decoder
from prefixkit.errors import ParityError
from prefixkit.export.parity import NO_PREFIX, SEED, CaseResult, Models, Pair, compare
from prefixkit.format.manifest import Positions
from prefixkit.injections import KeyValuePrefix, ParameterDelta
from prefixkit.prefix import load
from prefixkit.serving.prefix_table import ServedPrefix, served
from prefixkit.serving.report import ExportedFolder, read_report
from prefixkit.serving.runtime import Runtime

_ROWS = 4
_PROBE = 5
_UNBOUNDED = 10**6


def verify(
    folder: Path, decoder: Decoder, injection: KeyValuePrefix | None, delta: ParameterDelta | None = None
) -> tuple[CaseResult, ...]:
    """Run every case in onnxruntime and in PyTorch, on the CPU.

    Args:
        injection: the prefix that the folder has, in its file or in its graph; None for a bare backbone.
        delta: what its weights have.
    """
    report = read_report(folder)
    runtime = Runtime(report, device="cpu")
    cases = (
        _baked(injection)
        if report.baked
        else free_cases(own_pair(report, injection, runtime.dtype), probe(decoder, runtime.dtype))
    )
    room, models = room_of(decoder, cases), models_of(decoder, delta)
    return tuple(compare(name, runtime, models, pairs, room) for name, pairs in cases.items())


def refuse_differences(results: Sequence[CaseResult]) -> None:
    """Raise ParityError if any case is over its tolerance."""
    for result in results:
        if result.max_abs_difference > result.tolerance:
            raise ParityError(
                f"case {result.name!r}",
                expected=f"logits of onnxruntime within {result.tolerance:.1e} of those of PyTorch",
                found=f"a difference of {result.max_abs_difference:.1e}, so nothing was written",
                next_step=_step(result),
            )


def _step(result: CaseResult) -> str:
    if result.pytorch_difference is not None:
        return f"export with --dtype float32: PyTorch's own float16 differs by {result.pytorch_difference:.1e}"
    return "report it with the model's name: the exported graph is wrong for this architecture"


def room_of(decoder: Decoder, cases: Mapping[str, Sequence[Pair]]) -> int:
    """How many tokens of text fit behind every prefix of `cases`."""
    return (decoder.context_length or _UNBOUNDED) - max(_start(pair) for pairs in cases.values() for pair in pairs)


def models_of(decoder: Decoder, delta: ParameterDelta | None) -> Models:
    """PyTorch's models: as exported, and in float32."""
    model = decoder.release()
    return Models(model, model if model.dtype == torch.float32 else copy.deepcopy(model).float(), delta)


def _baked(injection: KeyValuePrefix | None) -> Mapping[str, Sequence[Pair]]:
    own = Pair(injection, None)
    return {"baked prefix": [own] * _ROWS, "baked prefix, one row": [own]}


def free_cases(own: Pair | None, probe: Pair) -> Mapping[str, Sequence[Pair]]:
    """The batches of a graph that takes prefixes: the folder's own, a random one, none, and all of them."""
    cases = {"random prefix": [probe] * _ROWS, "no prefix": [NO_PREFIX] * _ROWS, "no prefix, one row": [NO_PREFIX]}
    if own is not None:
        cases = {"prefix": [own] * _ROWS, "prefix, one row": [own], **cases}
    return {**cases, "mixed": [own or probe, NO_PREFIX, probe, own or NO_PREFIX]}


def own_pair(report: ExportedFolder, injection: KeyValuePrefix | None, dtype: np.dtype[np.floating]) -> Pair | None:
    """The folder's prefix, read back from its file; None without one."""
    if injection is None or report.prefix_file is None:
        return None
    return Pair(injection, served(load(report.folder / report.prefix_file), dtype))


def probe(decoder: Decoder, dtype: np.dtype[np.floating]) -> Pair:
    """A random prefix: it shows a past that is ignored, also where a trained one has little effect."""
    narrow = min((layer.window for layer in decoder.geometry if layer.window is not None), default=_UNBOUNDED)
    length = max(1, min(_PROBE, narrow - 1))
    generator = torch.Generator().manual_seed(SEED)
    shapes = [(layer.kv_heads, length, dim) for layer in decoder.geometry for dim in (layer.key_dim, layer.value_dim)]
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    prefix = KeyValuePrefix(
        keys=tuple(tensors[0::2]), values=tuple(tensors[1::2]), positions=Positions(text_start=length)
    )
    return Pair(prefix, ServedPrefix(tuple(tensor.numpy().astype(dtype) for tensor in tensors), length, length, None))


def _start(pair: Pair) -> int:
    return pair.torch.positions.text_start if pair.torch is not None else 0
