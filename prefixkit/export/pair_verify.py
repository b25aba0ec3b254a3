"""Verification of an exported encoder-decoder: the batches that must agree with PyTorch before an export is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prefixkit.backbones.encoder_decoder import NO_POSITIONS, EncoderDecoder
from prefixkit.export.pair_parity import BARE, Prefixed, compare
from prefixkit.export.parity import SEED, CaseResult
from prefixkit.format.names import ATTENTIONS
from prefixkit.injections import KeyValuePrefix, KeyValuePrefixes
from prefixkit.prefix import load
from prefixkit.serving.pair_prefix import ServedPrefixes, served_prefixes
from prefixkit.serving.pair_runtime import PairRuntime
from prefixkit.serving.prefix_table import ServedPrefix
from prefixkit.serving.report import read_report

_ROWS = 4
_PROBE = 5
_UNBOUNDED = 10**6


def verify_pair(folder: Path, backbone: EncoderDecoder, prefixes: KeyValuePrefixes | None) -> tuple[CaseResult, ...]:
    """Run every case in onnxruntime and in PyTorch, on the CPU.

    The folder is loaded as it will be served, by serving's own runtime, with the prefix read back from its file.
    """
    report = read_report(folder)
    runtime = PairRuntime(report, device="cpu")
    own = None
    if prefixes is not None and report.prefix_file is not None:
        own = Prefixed(prefixes, served_prefixes(load(folder / report.prefix_file), runtime.dtype))
    room = backbone.context_length or _UNBOUNDED
    cases = _cases(own, backbone, runtime.dtype)
    return tuple(compare(name, runtime, backbone, given, room) for name, given in cases.items())


def _cases(own: Prefixed | None, backbone: EncoderDecoder, dtype: np.dtype[Any]) -> Mapping[str, Sequence[Prefixed]]:
    """Each place alone, so that one that is ignored does not hide behind the others; and rows that differ in all."""
    alone = {".".join(place): _probe(backbone, dtype, [place]) for place in ATTENTIONS}
    probe = _probe(backbone, dtype, ATTENTIONS)
    cases: dict[str, Sequence[Prefixed]] = {f"random {place}": [one] * _ROWS for place, one in alone.items()}
    cases.update({"no prefix": [BARE] * _ROWS, "no prefix, one row": [BARE]})
    if own is not None:
        cases = {"prefix": [own] * _ROWS, "prefix, one row": [own], **cases}
    return {**cases, "mixed": [own or probe, BARE, probe, *alone.values()]}


def _probe(backbone: EncoderDecoder, dtype: np.dtype[Any], places: Sequence[tuple[str, str]]) -> Prefixed:
    """Random prefixes, of another length in each place."""
    generator, parts, served = torch.Generator().manual_seed(SEED), [], {}
    for stack, attention in places:
        length, layers = _PROBE + ATTENTIONS.index((stack, attention)), backbone.identity.stacks[stack]
        shapes = [(layer.kv_heads, length, dim) for layer in layers for dim in (layer.key_dim, layer.value_dim)]
        drawn = tuple(torch.randn(shape, generator=generator) for shape in shapes)
        part = KeyValuePrefix(
            keys=drawn[0::2], values=drawn[1::2], positions=NO_POSITIONS, stack=stack, attention=attention
        )
        parts.append(part)
        served[part.place] = ServedPrefix(tuple(tensor.numpy().astype(dtype) for tensor in drawn), length, 0, None)
    return Prefixed(KeyValuePrefixes(parts=tuple(parts)), ServedPrefixes(served, None))
