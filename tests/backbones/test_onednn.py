"""Products by oneDNN: what torch's own give, forwards and backwards, whatever stands in the place of a weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prefixkit.backbones import onednn, own_forward
from prefixkit.backbones.decoder import Decoder
from prefixkit.injections import ParameterDelta, Received
from tests.architectures import CONFIGS, tiny
from tests.backbones.test_decoder import wrap
from tests.ragged import labelled, padded, prompts, random_prefix

needs_onednn = pytest.mark.skipif(not onednn.works(), reason="no processor with x86's instructions, or no oneDNN")
WAYS = [onednn.MOST, 0, 100_000]
"""Bytes laid out anew: all weights, none, some."""


def linear_layers(decoder: Decoder) -> list[nn.Module]:
    return [module for module in decoder.model.modules() if type(module) in (nn.Linear, Conv1D)]


def logits_and_gradients(decoder: Decoder, received: Received, trained: list[Tensor]) -> list[Tensor]:
    logits = decoder.target_logits(**labelled(padded(prompts())), prefix=received)
    return [logits.detach(), *torch.autograd.grad(logits.square().sum(), trained)]


def apart(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, in the largest number of each tensor."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True))


def of_prefix(decoder: Decoder) -> list[Tensor]:
    prefix = random_prefix(decoder.model)
    keys, values = (tuple(each.requires_grad_() for each in side) for side in (prefix.keys, prefix.values))
    return logits_and_gradients(decoder, replace(prefix, keys=keys, values=values), [*keys, *values])


@needs_onednn
@pytest.mark.parametrize("most", WAYS)
@pytest.mark.parametrize("family", CONFIGS)
def test_losses_and_gradients_are_those_of_torch(family: str, most: int) -> None:
    decoder = wrap(tiny(family).requires_grad_(False))
    expected = of_prefix(decoder)
    onednn.multiply_by_onednn(decoder.model, most)
    layers = linear_layers(decoder)
    assert layers
    assert all(map(own_forward.has_one, layers))
    assert apart(of_prefix(decoder), expected) <= 1e-4
    onednn.multiply_by_torch(decoder.model)
    assert not any(map(own_forward.has_one, layers))


@needs_onednn
@pytest.mark.parametrize("name", ["h.1.attn.c_attn.bias", "h.1.attn.c_attn.weight"])
def test_gradients_reach_what_stands_in_the_place_of_a_parameter(name: str) -> None:
    decoder = wrap(tiny("gpt2").requires_grad_(False))
    torch.manual_seed(0)
    delta = (0.1 * torch.randn_like(decoder.model.get_parameter(f"transformer.{name}"))).requires_grad_()
    received = ParameterDelta(deltas={name: delta})
    expected = logits_and_gradients(decoder, received, [delta])
    without = decoder.target_logits(**labelled(padded(prompts())))
    onednn.multiply_by_onednn(decoder.model)
    found = logits_and_gradients(decoder, received, [delta])
    assert apart(found, expected) <= 1e-4
    assert (found[0] - without).abs().max() > 0.1


@needs_onednn
@pytest.mark.parametrize("exchange", [False, True])
def test_a_weight_that_changed_is_not_multiplied_as_it_was(exchange: bool) -> None:
    layer = nn.Linear(8, 4).requires_grad_(False)
    model = nn.Sequential(layer)
    onednn.multiply_by_onednn(model)  # type: ignore[arg-type]
    states, before = torch.ones(2, 8), layer(torch.ones(2, 8))
    if exchange:
        layer.weight.data = layer.weight.data * 2
    else:
        layer.weight.mul_(2)
    assert torch.allclose(layer(states) - layer.bias, 2 * (before - layer.bias), atol=1e-6)


@needs_onednn
def test_other_dtypes_and_other_classes_stay_with_torch() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4).double(), Own(4, 4), nn.Linear(4, 4, dtype=torch.bfloat16))
    onednn.multiply_by_onednn(model)  # type: ignore[arg-type]
    assert not any(map(own_forward.has_one, model))


@needs_onednn
def test_states_of_any_shape_and_order() -> None:
    layer = nn.Linear(8, 4).requires_grad_(False)
    inputs = [torch.randn(8), torch.randn(3, 8), torch.randn(5, 2, 8).transpose(0, 1), torch.randn(0, 8)]
    expected = [layer(states) for states in inputs]
    onednn.multiply_by_onednn(nn.Sequential(layer))  # type: ignore[arg-type]
    for states, right in zip(inputs, expected, strict=True):
        found = layer(states)
        assert found.shape == right.shape
        assert torch.allclose(found, right, atol=1e-6)


@pytest.mark.parametrize("error", [AttributeError, RuntimeError, TypeError])
def test_a_torch_without_the_operators_multiplies_by_itself(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> Tensor:
        raise error("no such operator")

    monkeypatch.setattr(onednn, "_linear", gone)
    onednn.works.cache_clear()
    try:
        decoder = wrap(tiny("gpt2").requires_grad_(False))
        onednn.multiply_by_onednn(decoder.model)
        assert not any(map(own_forward.has_one, linear_layers(decoder)))
    finally:
        onednn.works.cache_clear()


@needs_onednn
def test_a_released_model_is_as_it_was() -> None:
    decoder = wrap(tiny("gpt2").requires_grad_(False))
    onednn.multiply_by_onednn(decoder.model)
    decoder.release()
    assert not any(map(own_forward.has_one, linear_layers(decoder)))
