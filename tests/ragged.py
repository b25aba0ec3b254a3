"""Prompts of several lengths, padded on either side, and their oracle: a row alone, the prefix as the model's cache."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from prefixkit.backbones.geometry import measure
from prefixkit.format.manifest import Positions
from prefixkit.injections import KeyValuePrefix
from tests.architectures import VOCAB


def random_prefix(model: PreTrainedModel, length: int = 6, seed: int = 1) -> KeyValuePrefix:
    """A prefix that fits `model` and means nothing."""
    generator = torch.Generator().manual_seed(seed)
    layers = measure(model, "tiny")
    return KeyValuePrefix(
        keys=tuple(torch.randn(layer.kv_heads, length, layer.key_dim, generator=generator) for layer in layers),
        values=tuple(torch.randn(layer.kv_heads, length, layer.value_dim, generator=generator) for layer in layers),
        positions=Positions(text_start=length),
    )


def prompts() -> list[Tensor]:
    """Three rows of 5, 20 and 11 tokens."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(1, VOCAB, (length,), generator=generator) for length in (5, 20, 11)]


def padded(rows: list[Tensor], side: str = "left") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, three slots wider than the longest row."""
    width = max(map(len, rows)) + 3
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where], mask[index, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def labelled(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch with every real token as a label."""
    return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def alone(model: PreTrainedModel, row: Tensor, prefix: KeyValuePrefix | None) -> Tensor:
    """Logits [seq, vocab] of one row in a model without hooks, the prefix being the beginning of the cache."""
    length = prefix.length if prefix is not None else 0
    cache = DynamicCache()
    for layer in range(len(prefix.keys) if prefix is not None else 0):
        cache.update(prefix.keys[layer][None], prefix.values[layer][None], layer)
    positions = {} if model.config.model_type == "bloom" else {"position_ids": torch.arange(len(row))[None] + length}
    mask = torch.ones(1, length + len(row), dtype=torch.long)
    logits: Tensor = model(input_ids=row[None], attention_mask=mask, past_key_values=cache, **positions).logits[0]
    return logits


@torch.no_grad()
def greedy(model: PreTrainedModel, row: Tensor, prefix: KeyValuePrefix, steps: int) -> tuple[Tensor, Tensor]:
    """Tokens [steps] and logits [steps, vocab], each step computed afresh with `alone`."""
    text, logits = row, []
    for _ in range(steps):
        logits.append(alone(model, text, prefix)[-1])
        text = torch.cat([text, logits[-1].argmax()[None]])
    return text[len(row) :], torch.stack(logits)


def to_double(prefix: KeyValuePrefix) -> KeyValuePrefix:
    """The same prefix in float64."""
    return replace(
        prefix, keys=tuple(key.double() for key in prefix.keys), values=tuple(value.double() for value in prefix.values)
    )
