"""Verification of an exported model that reads: the batches that must agree with PyTorch before an export is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from prefixkit.backbones.decoder import Decoder
from prefixkit.backbones.positions import takes_positions
from prefixkit.export.parity import SEED, CaseResult
from prefixkit.export.reader_parity import Given, compare
from prefixkit.export.reader_plan import ReadingBackbone
from prefixkit.format.manifest import Positions
from prefixkit.injections import (
    Injection,
    KeyValuePrefix,
    ParameterDelta,
    TaskHead,
    joined,
    parts_of,
    positions_of,
)
from prefixkit.serving.prefix_table import ServedPrefix
from prefixkit.serving.reader import Reader
from prefixkit.serving.reader_rows import ServedReading

_ROWS = 4
_PROBE = 5
_UNBOUNDED = 10**6


def verify_reader(folder: Path, backbone: ReadingBackbone, received: Injection | None) -> tuple[CaseResult, ...]:
    """Run every case in onnxruntime and in PyTorch, on the CPU.

    The folder is loaded as it will be served, by serving's own runtime, with the file read back.

    Args:
        received: what the file that is exported injects, not folded; None for a bare backbone.
    """
    reader = Reader(folder, device="cpu")
    cases = _cases(reader, backbone, received)
    starts = [positions_of(one.torch).text_start for rows in cases.values() for one in rows]
    room = (backbone.context_length or _UNBOUNDED) - max(starts)
    return tuple(compare(name, reader, backbone, given, room) for name, given in cases.items())


def _cases(reader: Reader, backbone: ReadingBackbone, received: Injection | None) -> Mapping[str, Sequence[Given]]:
    own = Given(received, reader.own or ServedReading())
    # What is in the graph, and the head, which answers every row of a batch.
    always = tuple(part for part in parts_of(received) if isinstance(part, (ParameterDelta, TaskHead)))
    plain = Given(joined(always) if always else None, ServedReading(head=own.served.head))
    probe = _probe(backbone, plain)
    cases: dict[str, Sequence[Given]] = {
        "random prefix": [probe] * _ROWS,
        "no prefix": [plain] * _ROWS,
        "no prefix, one row": [plain],
        "mixed": [own, plain, probe, own],
    }
    return cases if received is None else {"prefix": [own] * _ROWS, "prefix, one row": [own], **cases}


def _probe(backbone: ReadingBackbone, plain: Given) -> Given:
    """Random keys and values, which any graph that reads takes."""
    narrow = min((layer.window for layer in backbone.geometry if layer.window is not None), default=_UNBOUNDED)
    length, generator = max(1, min(_PROBE, narrow - 1)), torch.Generator().manual_seed(SEED)
    shapes = [(layer.kv_heads, length, dim) for layer in backbone.geometry for dim in (layer.key_dim, layer.value_dim)]
    drawn = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    start = length if takes_positions(backbone.model) or isinstance(backbone, Decoder) else 0
    prefix = KeyValuePrefix(
        keys=drawn[0::2],
        values=drawn[1::2],
        positions=Positions(text_start=start, prefix_takes_positions=start > 0),
        stack="decoder" if isinstance(backbone, Decoder) else "encoder",
    )
    served = ServedPrefix(tuple(tensor.numpy().astype(np.float32) for tensor in drawn), length, start, None)
    return Given(joined((prefix, *parts_of(plain.torch))), ServedReading(prefix=served, head=plain.served.head))
