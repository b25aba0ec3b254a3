"""One case of decoding: the same tokens first, then rounds, then each contender by itself."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import torch

from tests.bench import serving_alone
from tests.bench.rounds import Row, alternate, compare, row
from tests.bench.serving_contenders import GENAI, OURS, PEFT, TRANSFORMERS, build_all
from tests.bench.serving_roof import ROOF, Roof
from tests.bench.serving_work import Effort, Tell, Turn, UnequalError, Work

PER_TOKEN = "milliseconds a token, decoding"
RATE = "tokens a second, all rows"
FIRST = "milliseconds to the first tokens, one prefix new"
_SETTLE = 0.05
"""Seconds: the threads of onnxruntime spin for a while behind their last work."""


def measure(case: str, work: Work, effort: Effort, tell: Tell, bar: float | None = None) -> list[Row]:
    """Ours against every peer.

    Args:
        bar: milliseconds a token that are wanted.

    Raises:
        UnequalError: not the same tokens, or a prefix that changes none.
    """
    everyone = build_all(work, effort.genai, tell)
    try:
        refuse_other_tokens(case, work, everyone, tell)
        rows = in_turns(case, work, everyone, effort.rounds, bar)
    finally:
        if GENAI in everyone:
            everyone[GENAI].close()
    names = list(everyone)
    del everyone
    # Their memory is needed for the processes.
    gc.collect()
    torch.cuda.empty_cache()
    return rows + memory(case, work, effort, tell, names)


def in_turns(case: str, work: Work, everyone: dict[str, Any], rounds: int, bar: float | None) -> list[Row]:
    """Times, round after round."""
    turns: dict[str, list[Turn]] = {name: [] for name in everyone}
    takes = {name: taken(one, turns[name]) for name, one in everyone.items()}
    found = alternate({**takes, ROOF: Roof(work).per_token}, rounds)
    rows = compare(case, PER_TOKEN, found)
    if bar is not None:
        rows.append(row(case, PER_TOKEN, found["ours"], [bar] * rounds, "the bar"))
    rows += compare(case, RATE, {name: [turn.rate for turn in each] for name, each in turns.items()})
    return rows + compare(case, FIRST, {name: [1000 * turn.first for turn in each] for name, each in turns.items()})


def memory(case: str, work: Work, effort: Effort, tell: Tell, names: list[str]) -> list[Row]:
    """Each contender in processes of its own."""
    if not effort.alone:
        return []
    tell(f"{case}: now each contender in a process of its own")
    alone = {name: [serving_alone.measure(work, name, effort.genai) for _ in range(effort.alone)] for name in names}
    return compare(case, serving_alone.PEAK, alone)


def taken(one: Any, turns: list[Turn]) -> Callable[[int], float]:
    """Turns that are kept, and what each of them took a token."""

    def take(_: int) -> float:
        time.sleep(_SETTLE)
        turns.append(one.write())
        return turns[-1].per_token

    return take


def refuse_other_tokens(case: str, work: Work, everyone: dict[str, Any], tell: Tell) -> None:
    """Raise UnequalError unless all write the same, and something else than without prefixes. It warms them up as well.

    In float32 all tokens must be equal. In half precision other kernels round otherwise, and random weights have many
    near ties: then half of the rows must begin with the same token.
    """
    expected = everyone[TRANSFORMERS].write().tokens
    for name in (name for name in OURS if name in everyone):
        _compare(case, work, name, everyone[name].write().tokens, expected)
        refuse_unchanged(case, name, everyone[name].write(behind=False).tokens, expected)
    _compare(case, work, PEFT, everyone[PEFT].write().tokens[:1], expected[:1])
    if GENAI in everyone:
        prompts = everyone[GENAI].prompts()
        bare = everyone[TRANSFORMERS].write(prompts, behind=False).tokens
        _compare(case, work, GENAI, everyone[GENAI].write().tokens, bare)
    tell(f"{case}: the same tokens")


def _compare(case: str, work: Work, name: str, found: list[list[int]], expected: list[list[int]]) -> None:
    exact, pairs = work.dtype == "float32", zip(found, expected, strict=True)
    same = [one == other if exact else one[0] == other[0] for one, other in pairs]
    if sum(same) < len(same) * (1 if exact else 0.5):
        at = same.index(False)
        raise UnequalError(f"{case}: not the same work: {name} writes {found[at]}, transformers {expected[at]}")


def refuse_unchanged(case: str, name: str, bare: list[list[int]], behind: list[list[int]]) -> None:
    """Raise UnequalError where half of the rows are the same without their prefixes."""
    if 2 * sum(one == other for one, other in zip(bare, behind, strict=True)) >= len(bare):
        raise UnequalError(f"{case}: a prefix changes nothing of what {name} writes")
