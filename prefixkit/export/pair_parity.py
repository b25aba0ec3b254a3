"""Parity of one batch of an encoder-decoder: what onnxruntime computes against PyTorch.

Sources of different lengths are read in one batch, targets of different lengths are written in it, in pieces as
generation feeds them. The reference is each row alone, without padding, by `EncoderDecoder.logits`. What differences
are accepted, `prefixkit.export.parity` says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from prefixkit.backbones.encoder_decoder import EncoderDecoder
from prefixkit.export.parity import SEED, STEPS, CaseResult, fed, largest, largest_distance, texts, tolerance
from prefixkit.injections import KeyValuePrefixes
from prefixkit.serving.pair_prefix import ServedPrefixes
from prefixkit.serving.pair_runtime import PairRuntime
from prefixkit.serving.prefix_table import Array


@dataclass(frozen=True)
class Prefixed:
    """What one row has before its texts, in PyTorch and in serving."""

    torch: KeyValuePrefixes | None
    served: ServedPrefixes | None


BARE = Prefixed(None, None)


def compare(
    name: str, runtime: PairRuntime, backbone: EncoderDecoder, given: Sequence[Prefixed], room: int
) -> CaseResult:
    """Run one batch in both, one row for each of `given`, and compare every logit; `room` is the longest text."""
    steps, vocabulary = min(STEPS, room - 1), backbone.identity.vocab_size
    sources = texts(len(given), room, 0, vocabulary, SEED)
    # Turned around, so that it is not the row with the longest source that has the longest target.
    targets = [[runtime.first, *row[1:]] for row in texts(len(given), room - steps, steps, vocabulary, SEED + 1)][::-1]
    found = fed(runtime.start([row.served for row in given], sources), targets, steps)
    prefixes = [row.torch for row in given]
    wanted = _each_alone(backbone, sources, targets, prefixes)
    bare = _each_alone(backbone, sources, targets, [None] * len(given)) if any(prefixes) else wanted
    return CaseResult(
        name=name,
        rows=tuple(map(len, targets)),
        max_abs_difference=largest_distance(found, wanted),
        pytorch_difference=None,
        effect=largest_distance(wanted, bare) if any(prefixes) else None,
        tolerance=tolerance(str(runtime.dtype), largest(wanted), None),
    )


@torch.no_grad()
def _each_alone(
    backbone: EncoderDecoder,
    sources: Sequence[list[int]],
    targets: Sequence[list[int]],
    prefixes: Sequence[KeyValuePrefixes | None],
) -> list[Array]:
    logits = [
        backbone.logits(_row(backbone, source), None, _row(backbone, target), prefix)[0]
        for source, target, prefix in zip(sources, targets, prefixes, strict=True)
    ]
    return [row.float().cpu().numpy() for row in logits]


def _row(backbone: EncoderDecoder, tokens: list[int]) -> torch.Tensor:
    return torch.tensor([tokens], device=backbone.device)
