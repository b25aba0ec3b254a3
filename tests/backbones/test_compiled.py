"""Compiled stacks: the same loss and the same gradients of the prefix, on every family, in padded and packed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.backbones.compiled import compile_stacks, restore_stacks
from tests.architectures import CONFIGS, tiny
from tests.backbones.test_decoder import wrap
from tests.backbones.test_rows import THROUGH_CACHE
from tests.backbones.test_targets import leaves
from tests.compiling import COMPILING
from tests.ragged import labelled, padded, prompts, random_prefix, to_double

pytestmark = COMPILING


def loss_and_gradients(backbone: Any, batch: dict[str, Tensor], prefix: Any) -> list[Tensor]:
    labels, tensors = batch["labels"], leaves(prefix)
    wanted = labels[labels != -100]
    with backbone.targets(batch["input_ids"], batch["attention_mask"], labels, prefix) as targets:
        loss = targets.summed(lambda logits, part: F.cross_entropy(logits, wanted[part], reduction="sum"))
    return [loss.detach(), *torch.autograd.grad(loss, tensors)]


IN_THE_GATE = ("llama",)
FAMILIES = [
    family if family in IN_THE_GATE else pytest.param(family, marks=pytest.mark.matrix)
    for family in CONFIGS
    if family not in THROUGH_CACHE
]


@pytest.mark.parametrize("family", FAMILIES)
def test_decoders(family: str) -> None:
    exact = torch.float32 if family == "qwen3_moe" else torch.float64
    decoder = wrap(tiny(family).to(exact).requires_grad_(False))
    batch = labelled(padded(prompts(), "right"))
    batch["labels"][:, 0] = -100
    prefix = random_prefix(decoder.model)
    prefix = to_double(prefix) if exact == torch.float64 else prefix
    expected = loss_and_gradients(decoder, batch, prefix)
    compile_stacks(decoder.model, backend="aot_eager")
    found = loss_and_gradients(decoder, batch, prefix)
    restore_stacks(decoder.model)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
