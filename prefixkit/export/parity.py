"""Parity of one batch: what onnxruntime computes against PyTorch.

Rows of different lengths run in one batch, padded on the left, the text fed in pieces as generation feeds it. The
reference is each row alone, without padding, in the unmodified model of `transformers` with the prefix as its cache,
in float32 arithmetic on the very weights and prefix that were exported.

No logit may differ by more than

- float32: 1e-4. Only where logits exceed 168, whose last places float32 itself does not resolve to that: 5 units in the
  last place of the largest.
- float16: 5e-3, or three times what PyTorch's own float16 differs from the reference in the same rows, which is what
  rounding alone does to this model; but never more than a fiftieth of the largest logit. bfloat16: 5e-2, or the same.
- keys and values of eight bits: what rounding them does in the reference, which rounds them as well, but never more
  than a fiftieth of the largest logit: a number between two whole ones goes to either with the last place of float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from prefixkit.backbones.cache_route import fill
from prefixkit.backbones.deltas import changed
from prefixkit.export.wrapper import takes_positions
from prefixkit.injections import KeyValuePrefix, ParameterDelta
from prefixkit.serving.one_batch import Batch
from prefixkit.serving.prefix_table import Array, ServedPrefix
from prefixkit.serving.runtime import Runtime

TOLERANCE = {"float32": 1e-4, "float16": 5e-3, "bfloat16": 5e-2}
"""Difference of logits that is always accepted, by dtype."""
_LAST_PLACES = 5
_TIMES_PYTORCH = 3
_OF_THE_LARGEST = 0.02
_LENGTHS = (24, 3, 1, 9)
STEPS = 3
"""Tokens that are fed one by one at the end of each row."""
SEED = 20210101


@dataclass(frozen=True)
class Pair:
    """What one row has before its text, in PyTorch and in serving, where a baked prefix is None as well."""

    torch: KeyValuePrefix | None
    served: ServedPrefix | None


NO_PREFIX = Pair(None, None)


@dataclass(frozen=True)
class Models:
    """The model in PyTorch, as it was exported and with the same weights in float32; one object if it is float32.

    Attributes:
        delta: what the graph has in its weights, and these models have not; None without.
        cache: what both keep keys and values in.
    """

    exported: PreTrainedModel
    exact: PreTrainedModel
    delta: ParameterDelta | None = None
    cache: Callable[[], DynamicCache] = DynamicCache


@dataclass(frozen=True)
class CaseResult:
    """How one batch compared.

    Attributes:
        rows: tokens of each row, those fed one by one included; 1 for an image.
        max_abs_difference: of the logits of all rows and tokens to the reference; infinite where one is not a number.
        pytorch_difference: the same of PyTorch in the dtype of the export; None in float32, which is the reference.
        effect: largest difference that the prefixes make in PyTorch; None in a case without a prefix.
        tolerance: what was accepted.
    """

    name: str
    rows: tuple[int, ...]
    max_abs_difference: float
    pytorch_difference: float | None
    effect: float | None
    tolerance: float


def compare(name: str, runtime: Runtime, models: Models, pairs: Sequence[Pair], room: int) -> CaseResult:
    """Run one batch in both, one row for each pair, and compare every logit; `room` is the longest text that fits."""
    steps = min(STEPS, room - 1)
    rows = texts(len(pairs), room - steps, steps, models.exact.config.vocab_size)
    found = fed(runtime.start([pair.served for pair in pairs]), rows, steps)
    return compared(name, str(runtime.dtype), models, pairs, rows, found)


def compared(
    name: str,
    dtype: str,
    models: Models,
    pairs: Sequence[Pair],
    rows: Sequence[list[int]],
    found: Sequence[Array],
    last: int | None = None,
) -> CaseResult:
    """What PyTorch says to `rows`, beside what was `found` in a graph of `dtype`; of the `last` tokens alone."""
    prefixes = [_as_exported(pair.torch, models.exported.dtype) for pair in pairs]

    def alone(
        model: PreTrainedModel, before: Sequence[KeyValuePrefix | None], cache: Callable[[], DynamicCache]
    ) -> list[Array]:
        found = [_alone(model, row, prefix, cache()) for row, prefix in zip(rows, before, strict=True)]
        return [logits if last is None else logits[-last:] for logits in found]

    with changed(models.exact, models.delta):
        wanted = alone(models.exact, prefixes, models.cache)
    # A row without a prefix is its own bare row, and has no effect.
    changes = any(prefixes) or models.delta is not None
    bare = alone(models.exact, [None] * len(rows), models.cache) if changes else wanted
    with changed(models.exported, models.delta):
        rounded = None if models.exported is models.exact else alone(models.exported, prefixes, models.cache)
    own = None if rounded is None else largest_distance(rounded, wanted)
    accepted = tolerance(dtype, largest(wanted), own)
    if models.cache is not DynamicCache:
        rounding = largest_distance(wanted, alone(models.exact, prefixes, DynamicCache))
        accepted = max(accepted, min(rounding, _OF_THE_LARGEST * largest(wanted)))
    return CaseResult(
        name=name,
        rows=tuple(map(len, rows)),
        max_abs_difference=largest_distance(found, wanted),
        pytorch_difference=own,
        effect=largest_distance(wanted, bare) if changes else None,
        tolerance=accepted,
    )


def tolerance(dtype: str, largest: float, own: float | None) -> float:
    """The difference that is accepted; see the module.

    Args:
        largest: the largest absolute logit.
        own: what PyTorch's own computation in `dtype` differs, None in float32.
    """
    if own is None:
        return max(TOLERANCE[dtype], _LAST_PLACES * float(np.finfo(dtype).eps) * largest)
    return max(TOLERANCE[dtype], min(_TIMES_PYTORCH * own, _OF_THE_LARGEST * largest))


def texts(rows: int, longest: int, steps: int, vocabulary: int, seed: int = SEED) -> list[list[int]]:
    """Random token ids of different lengths: at most `longest`, and `steps` more."""
    random = np.random.default_rng(seed)
    lengths = [max(1, min(_LENGTHS[row % len(_LENGTHS)], longest)) + steps for row in range(rows)]
    return [random.integers(0, vocabulary, length).tolist() for length in lengths]


def fed(batch: Batch, rows: list[list[int]], steps: int) -> list[Array]:
    """The logits [tokens, vocab] of each row: all but the last `steps` tokens in one go, the rest one by one."""
    first = batch.feed([row[: len(row) - steps] for row in rows])
    pieces = [[first[index, first.shape[1] - (len(row) - steps) :]] for index, row in enumerate(rows)]
    for step in range(steps, 0, -1):
        logits = batch.feed([[row[-step]] for row in rows])
        for index, piece in enumerate(pieces):
            piece.append(logits[index])
    return [np.concatenate(piece) for piece in pieces]


def _as_exported(prefix: KeyValuePrefix | None, dtype: torch.dtype) -> KeyValuePrefix | None:
    if prefix is None:
        return None
    keys, values = (tuple(tensor.to(dtype) for tensor in tensors) for tensors in (prefix.keys, prefix.values))
    return replace(prefix, keys=keys, values=values)


@torch.no_grad()
def _alone(model: PreTrainedModel, row: list[int], prefix: KeyValuePrefix | None, cache: DynamicCache) -> Array:
    length = prefix.length if prefix is not None else 0
    start = prefix.positions.text_start if prefix is not None else 0
    tokens = torch.tensor([row], device=model.device)
    if prefix is not None:
        fill(cache, prefix, tokens, model.dtype)
    positions = torch.arange(start, start + len(row), device=model.device)[None]
    keywords = {"position_ids": positions} if takes_positions(model) else {}
    mask = torch.ones(1, length + len(row), dtype=torch.long, device=model.device)
    logits = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, **keywords).logits[0]
    result: Array = logits.float().cpu().numpy()
    return result


def largest(rows: Sequence[Array]) -> float:
    """The largest absolute logit."""
    return max(float(np.abs(logits).max()) for logits in rows)


def largest_distance(some: Sequence[Array], others: Sequence[Array]) -> float:
    distance = max(float(np.abs(one - other).max()) for one, other in zip(some, others, strict=True))
    return distance if np.isfinite(distance) else float("inf")
