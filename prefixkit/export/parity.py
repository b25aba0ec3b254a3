"""Parity of one batch: what onnxruntime computes against PyTorch.

Rows of different lengths run in one batch, padded on the left, the text fed in pieces as generation feeds it. The
reference is each row alone, without padding, in the unmodified model of `transformers` with the prefix as its cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from prefixkit.export.wrapper import takes_positions
from prefixkit.injections import KeyValuePrefix
from prefixkit.serving.prefix_table import Array, ServedPrefix
from prefixkit.serving.runtime import Runtime

TOLERANCE = {"float32": 1e-4, "float16": 5e-3}
"""Difference of logits that is accepted by dtype, or 5 units in the last place of the largest logit if that is more."""
_LENGTHS = (24, 3, 1, 9)
_STEPS = 3
SEED = 20210101


@dataclass(frozen=True)
class Pair:
    """What one row has before its text, in PyTorch and in serving, where a baked prefix is None as well."""

    torch: KeyValuePrefix | None
    served: ServedPrefix | None


NO_PREFIX = Pair(None, None)


@dataclass(frozen=True)
class CaseResult:
    """How one batch compared.

    Attributes:
        rows: tokens of each row, those fed one by one included.
        max_abs_difference: of the logits of all rows and tokens; infinite where one is not a number.
        effect: largest difference that the prefixes make in PyTorch; None in a case without a prefix.
        tolerance: what was accepted.
    """

    name: str
    rows: tuple[int, ...]
    max_abs_difference: float
    effect: float | None
    tolerance: float


def compare(name: str, runtime: Runtime, model: PreTrainedModel, pairs: Sequence[Pair], room: int) -> CaseResult:
    """Run one batch in both, one row for each pair, and compare every logit; `room` is the longest text that fits."""
    steps = min(_STEPS, room - 1)
    rows = _texts(len(pairs), room - steps, steps, model.config.vocab_size)
    found = _served(runtime, rows, [pair.served for pair in pairs], steps)
    wanted = [_alone(model, row, pair.torch) for row, pair in zip(rows, pairs, strict=True)]
    bare = [_alone(model, row, None) if pair.torch is not None else None for row, pair in zip(rows, pairs, strict=True)]
    differences = [_distance(one, other) for one, other in zip(found, wanted, strict=True)]
    effects = [_distance(one, other) for one, other in zip(wanted, bare, strict=True) if other is not None]
    return CaseResult(
        name=name,
        rows=tuple(map(len, rows)),
        max_abs_difference=max(differences),
        effect=max(effects, default=None),
        tolerance=_tolerance(str(runtime.dtype), max(float(np.abs(logits).max()) for logits in wanted)),
    )


def _texts(rows: int, longest: int, steps: int, vocabulary: int) -> list[list[int]]:
    random = np.random.default_rng(SEED)
    lengths = [max(1, min(_LENGTHS[row % len(_LENGTHS)], longest)) + steps for row in range(rows)]
    return [random.integers(0, vocabulary, length).tolist() for length in lengths]


def _served(runtime: Runtime, rows: list[list[int]], prefixes: list[ServedPrefix | None], steps: int) -> list[Array]:
    """The logits [tokens, vocab] of each row: all but the last `steps` tokens in one go, the rest one by one."""
    decoding = runtime.start(prefixes)
    first = decoding.feed([row[: len(row) - steps] for row in rows])
    pieces = [[first[index, first.shape[1] - (len(row) - steps) :]] for index, row in enumerate(rows)]
    for step in range(steps, 0, -1):
        logits = decoding.feed([[row[-step]] for row in rows])
        for index, piece in enumerate(pieces):
            piece.append(logits[index])
    return [np.concatenate(piece) for piece in pieces]


@torch.no_grad()
def _alone(model: PreTrainedModel, row: list[int], prefix: KeyValuePrefix | None) -> Array:
    cache = DynamicCache()
    length = prefix.length if prefix is not None else 0
    if prefix is not None:
        for layer, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            cache.update(key[None].to(model.device, model.dtype), value[None].to(model.device, model.dtype), layer)
    start = prefix.positions.text_start if prefix is not None else 0
    tokens = torch.tensor([row], device=model.device)
    positions = torch.arange(start, start + len(row), device=model.device)[None]
    keywords = {"position_ids": positions} if takes_positions(model) else {}
    mask = torch.ones(1, length + len(row), dtype=torch.long, device=model.device)
    logits = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, **keywords).logits[0]
    result: Array = logits.float().cpu().numpy()
    return result


def _distance(one: Array, other: Array) -> float:
    distance = float(np.abs(one - other).max())
    return distance if np.isfinite(distance) else float("inf")


def _tolerance(dtype: str, largest: float) -> float:
    # float16 has steps of 0.016 at 16, where the logits of real models lie.
    return max(TOLERANCE[dtype], 5 * float(np.finfo(dtype).eps) * largest)
