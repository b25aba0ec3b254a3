"""The last layer's MLP works where logits are wanted, and nothing that is wanted changes."""

from __future__ import annotations

import pytest
import torch

from prefixkit.backbones.recomputation import layers_to_recompute, recompute
from tests.architectures import CONFIGS, tiny
from tests.backbones.test_decoder import wrap
from tests.ragged import labelled, padded, prompts, random_prefix

WITHOUT = ("opt", "bloom")
"""OPT has no module for its MLP, and Bloom's is given a residual as well."""


@pytest.mark.parametrize("family", CONFIGS)
def test_it_works_where_logits_are_wanted(family: str) -> None:
    decoder = wrap(tiny(family).requires_grad_(False))
    batch = labelled(padded(prompts(), "right"))
    batch["labels"][:, :4] = -100
    wanted = int((batch["labels"] != -100).sum())
    received = random_prefix(decoder.model)
    last, seen = layers_to_recompute(decoder.model)[-1], list[int]()
    everywhere = decoder.logits(batch["input_ids"], batch["attention_mask"], received)
    inside = getattr(last, "mlp", last)
    with torch.no_grad():
        weight = next(module for module in inside.modules() if getattr(module, "weight", None) is not None)
        hook = weight.register_forward_pre_hook(lambda _, given: seen.append(given[0].numel() // given[0].shape[-1]))
        found = decoder.target_logits(**batch, prefix=received)
        hook.remove()
    chosen = (batch["labels"] != -100).roll(-1, dims=1)
    chosen[:, -1] = False
    assert (found - everywhere[chosen]).abs().max() <= 1e-5
    assert wanted < batch["labels"].numel() // 2
    if family not in WITHOUT:
        assert seen == [wanted]
    assert "forward" not in vars(inside)


def test_what_is_computed_again_works_everywhere() -> None:
    decoder = wrap(tiny("gpt2").requires_grad_(False))
    recompute(decoder.model)
    batch = labelled(padded(prompts(), "right"))
    batch["labels"][:, 0] = -100
    mlp = layers_to_recompute(decoder.model)[-1].mlp
    seen: list[tuple[int, ...]] = []
    hook = mlp.register_forward_pre_hook(lambda _, given: seen.append(tuple(given[0].shape[:2])))
    decoder.target_logits(**batch, prefix=random_prefix(decoder.model))
    hook.remove()
    assert seen[-1] == (len(batch["labels"]), batch["labels"].shape[1] - 1)
