"""Which biases learn: all but those of keys, which no softmax sees, unless a prefix stands beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor

from prefixkit.backbones.deltas import biases
from prefixkit.backbones.encoder import Encoder
from prefixkit.backbones.geometry import reader_of
from prefixkit.injections import Combined, ParameterDelta
from tests.architectures import tiny
from tests.backbones.test_decoder import wrap
from tests.encoders import rows
from tests.invariants.attention import random_prefix
from tests.ragged import prompts
from tests.ragged import random_prefix as random_decoder_prefix

Load = Callable[..., Encoder]
FAMILIES = ("bert", "roberta", "electra", "distilbert", "vit", "deit", "dinov2", "dinov2_with_registers")
NOTHING = 1e-12
SOMETHING = 1e-7


def zeros(parameters: Mapping[str, Tensor]) -> ParameterDelta:
    return ParameterDelta(
        deltas={name: torch.zeros_like(weight).double().requires_grad_() for name, weight in parameters.items()}
    )


def largest(deltas: ParameterDelta, states: Tensor) -> dict[str, float]:
    """By name the largest gradient of something that all of `states` have a part in."""
    direction = torch.randn(states.shape, generator=torch.Generator().manual_seed(7)).double()
    found = torch.autograd.grad((states * direction).sum(), list(deltas.deltas.values()))
    return {name: gradient.abs().max().item() for name, gradient in zip(deltas.deltas, found, strict=True)}


def keys_of(gradients: Mapping[str, object]) -> set[str]:
    """Biases of keys, by what the families call them."""
    return {name for name in gradients if name.split(".")[-2] in ("key", "k_lin", "k_proj")}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_bias_of_an_encoder_learns_but_those_of_keys(encoder: Load, family: str) -> None:
    """A key's bias adds the same to all scores of a query; a prefix's slots have none, and then it does not."""
    backbone, (row, *_) = encoder(family, torch.float64), rows(family, torch.float64)
    reader = reader_of(backbone.model)
    inside = {id(weight) for weight in reader.parameters()}
    known = {name: weight for name, weight in biases(backbone.model).items() if id(weight) in inside}
    delta, prefix = zeros(known), random_prefix(backbone, offset=False)
    alone = largest(delta, backbone.states(row, delta))
    keys = keys_of(alone)
    assert len(keys) == 2
    assert max(alone[name] for name in keys) < NOTHING
    assert min(value for name, value in alone.items() if name not in keys) > SOMETHING
    beside = largest(delta, backbone.states(row, Combined(parts=(prefix, delta))))
    assert min(beside.values()) > SOMETHING


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "qwen2"])
def test_biases_of_keys_learn_where_keys_are_rotated(family: str) -> None:
    """OPT's do not; a rotated bias is another one for each key."""
    decoder, row = wrap(tiny(family).double()), prompts()[0][None]
    known = biases(decoder.model)
    delta = zeros(known)
    alone = largest(delta, decoder.logits(row, None, delta))
    keys = {name for name in alone if name.split(".")[-2] == "k_proj"}
    assert len(keys) == {"opt": 2, "gpt_neox": 0, "qwen2": 2}[family]
    silent = {name for name, value in alone.items() if value < NOTHING}
    assert silent == (keys if family == "opt" else set())
    received = Combined(parts=(random_decoder_prefix(decoder.model), delta))
    assert min(largest(delta, decoder.logits(row, None, received)).values()) > SOMETHING
