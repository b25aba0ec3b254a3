"""Training against a loop that anybody would write: `transformers`, a cache that begins with the prefix, and AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache

from prefixkit.data.batches import EncodedExample
from prefixkit.injections import KeyValuePrefix
from prefixkit.prefix import key_values
from prefixkit.quickstart import BACKBONE, E2E
from prefixkit.training import loop
from prefixkit.training.config import TrainConfig
from prefixkit.training.preparation import prepare
from tests.training.test_loop import Interrupted, settings

STEPS, WARMUP, RATE, LENGTH = 20, 3, 0.1, 8


def config(output: Path, layout: str) -> TrainConfig:
    return settings(
        BACKBONE,
        E2E / "valid.jsonl",
        output,
        eval_data=None,
        task="e2e",
        steps=STEPS,
        batch_size=4,
        layout=layout,
        method={"length": LENGTH},
        optimizer={"lr": RATE, "warmup_steps": WARMUP},
    )


def plain_loop(start: KeyValuePrefix, batches: list[list[EncodedExample]]) -> tuple[list[float], list[Tensor]]:
    """The loss of every step, and the keys and values of each layer at the end."""
    model = AutoModelForCausalLM.from_pretrained(BACKBONE, dtype=torch.float32).eval().requires_grad_(False)
    pairs = zip(start.keys, start.values, strict=True)
    prefix = [one.detach().clone().requires_grad_() for pair in pairs for one in pair]
    optimizer = torch.optim.AdamW(prefix, lr=RATE, weight_decay=0.0)
    losses = []
    for number, examples in enumerate(batches):
        share = (number + 1) / WARMUP if number < WARMUP else (STEPS - number) / (STEPS - WARMUP)
        optimizer.param_groups[0]["lr"] = RATE * share
        loss = plain_loss(model, prefix, examples)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prefix, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, prefix


def plain_loss(model: Any, prefix: list[Tensor], examples: list[EncodedExample]) -> Tensor:
    """Mean cross-entropy of the targets, in padded rows behind the prefix."""
    longest = max(map(len, examples))
    ids, mask = torch.zeros(2, len(examples), longest, dtype=torch.long).unbind()
    labels = torch.full_like(ids, -100)
    for row, example in enumerate(examples):
        ids[row, : len(example)], mask[row, : len(example)] = torch.tensor(example.words), 1
        labels[row, len(example.prompt) : len(example)] = torch.tensor(example.target)
    cache = DynamicCache()
    for layer, (key, value) in enumerate(zip(prefix[::2], prefix[1::2], strict=True)):
        rows = (one.expand(len(examples), -1, -1, -1) for one in (key, value))
        cache.update(*rows, layer)
    seen = torch.cat([torch.ones(len(examples), LENGTH, dtype=torch.long), mask], dim=1)
    logits = model(input_ids=ids, attention_mask=seen, past_key_values=cache).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_loss_curve_is_that_of_a_plain_loop(tmp_path: Path, layout: str) -> None:
    prepared, heard = prepare(config(tmp_path / "p", layout)), Interrupted()
    start, plan = prepared.method.fold(), prepared.batches
    assert isinstance(start, KeyValuePrefix)
    losses, prefix = plain_loop(start, [[plan.examples[i] for i in plan.indices(step)] for step in range(STEPS)])
    trained = loop.complete(prepared, resume=False, listener=heard)
    assert heard.losses == pytest.approx(losses, abs=1e-5)
    assert losses[-1] < losses[0] - 0.5
    made = [torch.from_numpy(one) for pair in key_values(trained) for one in pair]
    # AdamW divides by what a rounding may have made of nearly nothing: single numbers are further apart than losses.
    assert max((ours - theirs.detach()).abs().mean() for ours, theirs in zip(made, prefix, strict=True)) <= 1e-4
