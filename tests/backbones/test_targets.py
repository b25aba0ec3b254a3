"""Losses over the logits of targets, some at a time: the value and the gradient of all of them at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.backbones.backbone import Backbone
from prefixkit.backbones.load import load_backbone
from prefixkit.backbones.targets import ELEMENTS, Targets, most
from prefixkit.injections import Injection, KeyValuePrefix, KeyValuePrefixes, ParameterDelta
from tests import encoder_decoders
from tests.architectures import CONFIGS, VOCAB, tiny
from tests.backbones.test_decoder import wrap
from tests.encoders import encoder_folder
from tests.ragged import labelled, padded, prompts, random_prefix, to_double

ROWS = 2
FEW = VOCAB * ROWS
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def leaves(prefix: Injection) -> list[Tensor]:
    parts = prefix.parts if isinstance(prefix, KeyValuePrefixes) else (prefix,)
    tensors = [tensor for part in parts if isinstance(part, KeyValuePrefix) for tensor in (*part.keys, *part.values)]
    return [tensor.requires_grad_() for tensor in tensors]


def both(backbone: Backbone, batch: dict[str, Tensor], prefix: Injection) -> tuple[list[Any], list[int]]:
    """(loss, gradients) from all logits and from two tokens' at a time, and how many the output layer saw then."""
    labels, tensors = batch["labels"], leaves(prefix)
    wanted = labels[labels != -100]
    inputs = (batch["input_ids"], batch["attention_mask"], labels, prefix)

    def loss_of(logits: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits, wanted[part], reduction="sum")

    seen: list[int] = []
    whole = loss_of(backbone.target_logits(*inputs), slice(None))
    expected = [whole.detach(), *torch.autograd.grad(whole * 0.7, tensors)]
    head = backbone.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, given, out: seen.append(out.numel() // out.shape[-1]))
    with backbone.targets(*inputs) as targets:
        summed = targets.summed(loss_of, FEW)
    hook.remove()
    found = [summed.detach(), *torch.autograd.grad(summed * 0.7, tensors)]
    return list(zip(found, expected, strict=True)), seen


@pytest.mark.parametrize("family", CONFIGS)
def test_decoders(family: str) -> None:
    exact = torch.float32 if family == "qwen3_moe" else torch.float64  # its experts know no float64
    decoder = wrap(tiny(family).to(exact).requires_grad_(False))
    batch = labelled(padded(prompts(), "right"))
    batch["labels"][:, 0] = -100
    prefix = random_prefix(decoder.model)
    pairs, seen = both(decoder, batch, to_double(prefix) if exact == torch.float64 else prefix)
    for found, expected in pairs:
        assert (found - expected).abs().max() <= TOLERANCE[exact] * max(1.0, float(expected.abs().max()))
    assert all(gradient.abs().max() > 0 for _, gradient in pairs[1:])
    assert max(seen) == ROWS


def parts_of(tokens: int, vocabulary: int) -> list[int]:
    """How many tokens each part has, all of them together once."""
    parts = list(Targets(torch.zeros(tokens, 1), lambda states: states, vocabulary).parts())
    assert [token for part in parts for token in range(tokens)[part]] == list(range(tokens))
    return [len(range(tokens)[part]) for part in parts]


def test_parts_are_larger_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parts_of(1000, 1 << 17) == [125] * 8
    # A CPU in the place of a GPU.
    monkeypatch.setitem(ELEMENTS, "cpu", most(torch.device("cuda"), 1 << 17))
    assert parts_of(1000, 1 << 17) == [500] * 2


def test_parts_hold_no_more_tokens_than_enough() -> None:
    assert parts_of(1024, 1 << 13) == parts_of(1024, 1 << 15) == [512] * 2
    assert parts_of(1024, 1 << 18) == [64] * 16
    assert parts_of(1025, 1 << 13) == [341, 342, 342]
    assert parts_of(3, 1 << 30) == [1] * 3


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_encoder_decoders(family: str) -> None:
    model = encoder_decoders.tiny(family).requires_grad_(False)
    if family == "bart":
        model.final_logits_bias.normal_()
    backbone = encoder_decoders.wrap(model.double())
    prefixes = encoder_decoders.random_prefixes(backbone)
    prefixes = KeyValuePrefixes(parts=tuple(to_double(part) for part in prefixes.parts))
    batch = {
        **padded(prompts(), "right"),
        "labels": torch.tensor([[7, 8, 9, -100], [3, -100, -100, -100], [5, 6, 7, 8]]),
    }
    pairs, seen = both(backbone, batch, prefixes)
    for found, expected in pairs:
        assert (found - expected).abs().max() <= TOLERANCE[torch.float64] * max(1.0, float(expected.abs().max()))
    assert max(seen) == ROWS


@pytest.mark.parametrize("family", ["roberta", "modernbert", "electra"])
def test_masked_words(family: str, tmp_path: Path) -> None:
    backbone = load_backbone(encoder_folder(family, tmp_path / family))
    backbone.model.double()
    batch = labelled(padded(prompts(), "right"))
    prefix = backbone.key_values_of([5, 6, 7])
    assert isinstance(prefix, KeyValuePrefix)
    pairs, seen = both(backbone, batch, prefix)
    for found, expected in pairs:
        assert (found - expected).abs().max() <= TOLERANCE[torch.float64] * max(1.0, float(expected.abs().max()))
    assert max(seen) == ROWS


def test_an_output_that_is_not_known_is_used_whole() -> None:
    """What a model does behind its output layer, such as Cohere's scale, must not be lost."""
    model = tiny("llama").double().requires_grad_(False)
    plain: Callable[..., Any] = model.forward

    def scaled(*arguments: Any, **keywords: Any) -> Any:
        made = plain(*arguments, **keywords)
        made.logits = made.logits * 3
        return made

    model.forward = scaled  # type: ignore[method-assign]
    batch = labelled(padded(prompts(), "right"))
    batch["labels"][:, 0] = -100
    pairs, _ = both(wrap(model), batch, to_double(random_prefix(model)))
    for found, expected in pairs:
        assert (found - expected).abs().max() <= TOLERANCE[torch.float64] * max(1.0, float(expected.abs().max()))


def test_a_delta_of_the_output_layer_has_its_gradient(tmp_path: Path) -> None:
    backbone = load_backbone(encoder_folder("roberta", tmp_path / "roberta"))
    batch = labelled(padded(prompts(), "right"))
    name = next(
        name for name in backbone.parameter_shapes("bias") if name.startswith("lm_head") and "dense" not in name
    )
    delta = torch.randn(VOCAB).requires_grad_()
    received = ParameterDelta(deltas={name: delta})
    wanted = batch["labels"][batch["labels"] != -100]
    inputs = (batch["input_ids"], batch["attention_mask"], batch["labels"], received)
    whole = F.cross_entropy(backbone.target_logits(*inputs), wanted, reduction="sum")
    with backbone.targets(*inputs) as targets:
        summed = targets.summed(lambda logits, part: F.cross_entropy(logits, wanted[part], reduction="sum"), FEW)
    assert summed.item() == pytest.approx(whole.item(), rel=1e-5)
    (expected,), (found,) = (torch.autograd.grad(loss, delta) for loss in (whole, summed))
    assert expected.abs().max() > 1e-3
    assert (found - expected).abs().max() <= 1e-4


@torch.no_grad()
def test_without_gradients_there_are_none_to_compute() -> None:
    decoder = wrap(tiny("gpt2"))
    batch = labelled(padded(prompts(), "right"))
    batch["labels"][:, 0] = -100
    wanted = batch["labels"][batch["labels"] != -100]
    with decoder.targets(batch["input_ids"], batch["attention_mask"], batch["labels"]) as targets:
        total = targets.summed(lambda logits, part: F.cross_entropy(logits, wanted[part], reduction="sum"), FEW)
    whole = F.cross_entropy(decoder.target_logits(**batch), wanted, reduction="sum")
    assert total.item() == pytest.approx(whole.item(), rel=1e-5)
    assert not total.requires_grad
