"""What a sweep will need, before it begins: trials whose rows stand in the same passes, and others, one at a time."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from prefixkit.backbones.kept import Kept
from prefixkit.training import memory
from prefixkit.training.memory import Estimate
from prefixkit.training.out_of_memory import SMALLER, in_a_line
from prefixkit.training.preparation import Prepared
from prefixkit.training.side_by_side import most_tokens, received
from prefixkit.training.trials import Trial

_LEAVES = 2
"""Of a trial that stands beside others: a copy of what its rows receive, and its gradient."""


def within(needs: Estimate | None) -> AbstractContextManager[None]:
    """Passes of a sweep that `needs` so much, as far as it is known, in a `with` block.

    Raises:
        OutOfMemoryError: it is not there; says what would be.
    """
    rows = "a pass" if needs is None else f"a pass of {needs.rows} rows"
    return in_a_line("sweep", f"memory for {rows}", lambda: SMALLER if needs is None else needs.advice())


def estimate(found: Sequence[Trial]) -> Estimate:
    """What the largest pass of a sweep will need, beside what all trials keep; nothing of them changes."""
    together = [trial.prepared for trial in found if trial.shares]
    apart = [trial.prepared for trial in found if not trial.shares]
    passes = [_of_all(together)] if together else []
    # One step after the other: the largest batch is what counts.
    passes += [replace(memory.estimate(max(apart, key=_tokens)), trained=0)] if apart else []
    kept = sum(memory.trained_bytes(trial.prepared.method) for trial in found)
    return max((replace(needs, trained=needs.trained + kept) for needs in passes), key=lambda needs: needs.needed)


def _of_all(together: Sequence[Prepared]) -> Estimate:
    """What a pass with rows of several trials needs beside what they train, as if all were the longest of them."""
    # In front of a row stand as many slots as the longest prefix has.
    longest = max(together, key=lambda prepared: (_longest(prepared), memory.trained_bytes(prepared.method)))
    count = len(together)
    needs = memory.estimate(longest)
    with torch.no_grad():
        own = sum(tensor.nbytes for tensor in received(longest).tensors)
    rows = min(sum(map(memory.largest_batch, together)), max(1, most_tokens(longest.backbone) // _longest(longest)))
    once = Kept(count * needs.once.plainly, count * needs.once.recomputed, needs.once.layer)
    # Each row has a copy of its own, or the copy's gradient; whoever computes layers again has both.
    row = Kept(needs.row.plainly + own, needs.row.recomputed + 2 * own, needs.row.layer)
    return replace(needs, once=once, row=row, rows=rows, trained=count * _LEAVES * own, trials=count)


def _longest(prepared: Prepared) -> int:
    return max(map(len, prepared.batches.examples))


def _tokens(prepared: Prepared) -> int:
    return memory.largest_batch(prepared) * _longest(prepared)
