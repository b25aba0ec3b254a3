"""Ragged prompts onto ragged prefixes, all different: one call, row by row, and a padded call of transformers."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from prefixkit.prefix import Prefix, key_values
from prefixkit.serving.buffered_runtime import BufferedRuntime
from prefixkit.serving.session import Session
from tests.bench.rounds import Row, alternate, compare, row
from tests.bench.serving_peers import load_model, tensors_of
from tests.bench.serving_work import Effort, Tell, Tokens, UnequalError, Work, prefix_of

METRIC = "milliseconds to the first tokens, prefixes placed"
ROW_BY_ROW, PADDED = "ours, row by row", "transformers, one padded call"


def ragged(work: Work) -> tuple[list[Prefix], list[Tokens]]:
    """Prefixes of half of the length up to one and a half, and prompts from half of the tokens to all, by row."""
    draw = np.random.default_rng(work.seed)
    longest = replace(work, length=work.length + work.length // 2)
    lengths = draw.integers(work.length // 2, longest.length + 1, work.rows).tolist()
    tokens = draw.integers(work.prompt // 2, work.prompt + 1, work.rows).tolist()
    prefixes = [_cut(prefix, length) for prefix, length in zip(longest.prefixes, lengths, strict=True)]
    return prefixes, [prompt[:count] for prompt, count in zip(work.prompts(), tokens, strict=True)]


def _cut(prefix: Prefix, length: int) -> Prefix:
    tensors = [each[:, :length] for pair in key_values(prefix) for each in pair]
    return prefix_of(prefix.manifest.backbone, tensors)


class _Ours:
    """Rows of a session, with prefixes placed."""

    def __init__(self, work: Work, prefixes: list[Prefix], prompts: list[Tokens]) -> None:
        session = Session(work.buffered, device=work.device, threads=work.threads)  # type: ignore[arg-type]
        assert isinstance(session.runtime, BufferedRuntime)
        for number, prefix in enumerate(prefixes):
            session.add_prefix(f"row {number}", prefix)
        self.served: list[Any] = [session.prefixes[f"row {number}"] for number in range(work.rows)]
        self.prompts, self.rows = prompts, session.runtime.rows(work.rows, 2 * work.length + work.prompt)
        self.tokens: list[int] = []

    def one_call(self, _: int) -> float:
        """Milliseconds of one pass."""
        began = self._placed()
        self.tokens = self.rows.read(0, self.prompts).tokens.tolist()
        return 1000 * (time.perf_counter() - began)

    def row_by_row(self, _: int) -> float:
        """Milliseconds of a pass a row."""
        began = self._placed()
        self.tokens = [int(self.rows.read(at, [prompt]).tokens[0]) for at, prompt in enumerate(self.prompts)]
        return 1000 * (time.perf_counter() - began)

    def _placed(self) -> float:
        for number, prefix in enumerate(self.served):
            self.rows.begin(number, prefix)
        return time.perf_counter()


class _Padded:
    """One call of transformers, prefixes and prompts padded on the left."""

    def __init__(self, work: Work, prefixes: list[Prefix], prompts: list[Tokens]) -> None:
        self.model, rows = load_model(work), [tensors_of(prefix, work) for prefix in prefixes]
        lengths = [row[0].shape[1] for row in rows]
        self.stacked = [_left_padded(each).to(work.device) for each in zip(*rows, strict=True)]
        self.ids = _left_padded([torch.tensor(prompt)[None, :, None] for prompt in prompts])[:, 0, :, 0]
        past, own = (_real(counts) for counts in (lengths, [len(prompt) for prompt in prompts]))
        positions = (own.cumsum(-1) - 1).clamp(min=0) + torch.tensor(lengths)[:, None]
        self.given = {"input_ids": self.ids, "attention_mask": torch.cat([past, own], 1), "position_ids": positions}
        self.given = {name: each.to(work.device) for name, each in self.given.items()}
        self.tokens: list[int] = []

    @torch.inference_mode()
    def turn(self, _: int) -> float:
        """Milliseconds."""
        cache = DynamicCache()
        for layer in range(len(self.stacked) // 2):
            cache.update(self.stacked[2 * layer], self.stacked[2 * layer + 1], layer)
        began = time.perf_counter()
        logits = self.model(**self.given, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        self.tokens = logits[:, -1].argmax(-1).tolist()  # waits for the device
        return 1000 * (time.perf_counter() - began)


def _left_padded(rows: Any) -> torch.Tensor:
    longest = max(row.shape[1] for row in rows)
    return torch.stack([torch.nn.functional.pad(row, (0, 0, longest - row.shape[1], 0)) for row in rows])


def _real(counts: list[int]) -> torch.Tensor:
    longest = max(counts)
    return (torch.arange(longest) >= longest - torch.tensor(counts)[:, None]).long()


def measure(case: str, work: Work, effort: Effort, tell: Tell, bar: float | None = None) -> list[Row]:
    """One call against both.

    Raises:
        UnequalError: not the same tokens.
    """
    given = ragged(work)
    ours, padded = _Ours(work, *given), _Padded(work, *given)
    turns = {"ours": ours.one_call, ROW_BY_ROW: ours.row_by_row, PADDED: padded.turn}
    padded.turn(0)
    for turn in (ours.one_call, ours.row_by_row):
        turn(0)
        same = sum(one == other for one, other in zip(ours.tokens, padded.tokens, strict=True))
        if same < work.rows * (1 if work.dtype == "float32" else 0.5):
            raise UnequalError(f"{case}: not the same work: ours writes {ours.tokens}, transformers {padded.tokens}")
    tell(f"{case}: the same tokens")
    found = alternate(turns, effort.rounds)
    rows = compare(case, METRIC, found)
    return rows if bar is None else [*rows, row(case, METRIC, found["ours"], [bar] * effort.rounds, "the bar")]
