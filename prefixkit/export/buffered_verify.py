"""Verification of graphs that write into buffers: rows of several prefixes and lengths, one of which is replaced.

As in `prefixkit.export.verify`, the folder is loaded as it will be served, and PyTorch computes each row by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from prefixkit.backbones.decoder import Decoder
from prefixkit.export.parity import STEPS, CaseResult, Models, Pair, compared, texts
from prefixkit.export.rounded_cache import RoundedCache
from prefixkit.export.verify import free_cases, models_of, own_pair, probe, room_of
from prefixkit.injections import KeyValuePrefix
from prefixkit.serving.buffered_runtime import BufferedRuntime, Rows
from prefixkit.serving.cache_scales import LARGEST, CacheScales
from prefixkit.serving.prefix_table import Array
from prefixkit.serving.report import read_report


def verify_buffered(
    folder: Path, decoder: Decoder, injection: KeyValuePrefix | None, scales: CacheScales | None = None
) -> tuple[CaseResult, ...]:
    """Run every case in onnxruntime and in PyTorch: on the CPU, but bfloat16, which needs a GPU."""
    report = read_report(folder)
    runtime = BufferedRuntime(report, device="auto" if report.dtype == "bfloat16" else "cpu")
    random = probe(decoder, runtime.dtype)
    cases = free_cases(
        own_pair(report, injection, runtime.dtype), random if scales is None else _within(random, scales)
    )
    room = room_of(decoder, cases)
    models = models_of(decoder, None)
    if scales is not None:
        models = replace(models, cache=partial(RoundedCache, scales))
    results = [_compare(name, runtime, models, pairs, room) for name, pairs in cases.items()]
    # A runtime of its own: the weights of the graphs before are not needed beside it.
    runtime = BufferedRuntime(report, device="auto" if report.dtype == "bfloat16" else "cpu")
    shared = cases["random prefix"][0]
    return (*results, _compare("shared prefix", runtime, models, [*cases["mixed"], shared], room, shared))


def _within(pair: Pair, scales: CacheScales) -> Pair:
    """A prefix that eight bits can hold: what is larger is cut, in PyTorch as well."""
    assert pair.torch is not None
    assert pair.served is not None
    most = [LARGEST * scale for scale in scales.tensors]
    tensors = tuple(each.clip(-top, top) for each, top in zip(pair.served.tensors, most, strict=True))
    exact = [torch.from_numpy(each.astype(np.float32)) for each in tensors]
    given = replace(pair.torch, keys=tuple(exact[::2]), values=tuple(exact[1::2]))
    return Pair(given, replace(pair.served, tensors=tensors))


def _compare(
    name: str,
    runtime: BufferedRuntime,
    models: Models,
    pairs: Sequence[Pair],
    room: int,
    shared: Pair | None = None,
) -> CaseResult:
    steps = min(STEPS, room - 1)
    rows = texts(len(pairs), room - steps, steps, models.exact.config.vocab_size)
    longest = max(pair.served.length if pair.served else 0 for pair in pairs)
    made = runtime.rows(len(pairs), longest + max(map(len, rows)), sharing=shared is not None)
    for row, pair in enumerate(pairs):
        made.begin(row, pair.served, shared=pair is shared)
    return compared(name, str(runtime.dtype), models, pairs, rows, _fed(made, rows, steps), last=steps + 1)


def _fed(made: Rows, rows: list[list[int]], steps: int) -> list[Array]:
    """The logits [1 + steps, vocab] of each row behind all but its last `steps` tokens, then behind each of those."""
    found = [made.read(0, [row[: len(row) - steps] for row in rows]).logits]
    found += [made.read(0, [[row[-step]] for row in rows]).logits for step in range(steps, 0, -1)]
    return list(np.stack(found, axis=1))
