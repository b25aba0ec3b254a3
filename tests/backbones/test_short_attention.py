"""Short rows: what torch's attention gives, forwards and backwards, and that a prefix goes through it in training."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from prefixkit.backbones import short_attention
from prefixkit.backbones.short_attention import LONGEST, attend_short, attend_short_rows, is_short
from tests.architectures import tiny
from tests.backbones.test_decoder import wrap
from tests.ragged import labelled, padded, prompts, random_prefix, to_double

Heads = tuple[Tensor, Tensor, Tensor]


def heads(kv_heads: int, keys: int = 9) -> Heads:
    """Query, key and value, as layers have them: heads behind tokens in memory."""
    torch.manual_seed(0)
    query = torch.randn(2, 5, 4, 6, dtype=torch.float64).transpose(1, 2)
    key = torch.randn(2, kv_heads, keys, 6, dtype=torch.float64)
    value = torch.randn(2, kv_heads, keys, 3, dtype=torch.float64)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def masks() -> list[Tensor]:
    seen = torch.ones(5, 9, dtype=torch.bool).tril(4).expand(2, 1, 5, 9).clone()
    seen[1, :, :, :2] = False
    blind = seen.clone()
    blind[0, :, :2] = False
    return [seen, seen[:1], blind, torch.rand(2, 4, 5, 9) < 0.7]


@pytest.mark.parametrize("which", range(4))
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_outputs_and_gradients_are_those_of_torch(kv_heads: int, which: int, scale: float | None) -> None:
    given, mask = heads(kv_heads), masks()[which]
    query, key, value = given
    right = F.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True).transpose(1, 2)
    found = attend_short(*given, mask, scale)
    assert found.is_contiguous()
    assert found.shape == right.shape
    assert (found - right).abs().max() <= 1e-12
    weight = torch.randn_like(right)
    expected = torch.autograd.grad((right * weight).sum(), given)
    for ours, theirs in zip(torch.autograd.grad((found * weight).sum(), given), expected, strict=True):
        assert ours.shape == theirs.shape
        assert theirs.abs().max() > 1e-3
        assert (ours - theirs).abs().max() <= 1e-12


def test_gradients_are_finite_differences() -> None:
    mask = masks()[0]
    assert torch.autograd.gradcheck(lambda *given: attend_short(*given, mask), heads(2))


def test_what_is_given_stays_as_it_is() -> None:
    given, mask = heads(2), masks()[2]
    before = [each.detach().clone() for each in (*given, mask)]
    attend_short(*given, mask).sum().backward()
    assert all(map(torch.equal, before, (*given, mask)))


def test_what_is_left_to_torch() -> None:
    given, mask = heads(2), masks()[0]
    assert is_short(*given, mask, dropout=0.0, scaling=0.3, position_bias=None)
    assert not is_short(*given, mask, dropout=0.1)
    assert not is_short(*given, mask, position_bias=torch.zeros(1))
    assert not is_short(*given, mask.double())
    assert not is_short(*heads(2, keys=LONGEST + 1), mask)
    assert not is_short(*(each.detach() for each in given), mask)
    assert not is_short(*(each.bfloat16() for each in given), mask)
    assert not is_short(given[0], *(each[:1] for each in given[1:]), mask)
    with torch.no_grad():
        assert not is_short(*given, mask)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_short(*given, mask)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_a_model_in_training_goes_through_it(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = wrap(tiny(family).double().requires_grad_(False))
    prefix = to_double(random_prefix(decoder.model))
    trained = [each.requires_grad_() for each in (*prefix.keys, *prefix.values)]
    prefix = replace(prefix, keys=tuple(trained[: len(prefix.keys)]), values=tuple(trained[len(prefix.keys) :]))
    batch, calls = labelled(padded(prompts())), list[Tensor]()

    def counted(*given: Tensor) -> Tensor:
        calls.append(given[0])
        return attend_short(*given)

    attend_short_rows(decoder.model)
    monkeypatch.setattr(short_attention, "attend_short", counted)
    found = []
    for longest in (LONGEST, 0):
        monkeypatch.setattr(short_attention, "LONGEST", longest)
        logits = decoder.target_logits(**batch, prefix=prefix)
        found.append([logits.detach(), *torch.autograd.grad(logits.square().sum(), trained)])
    assert len(calls) == len(prefix.keys)
    assert all((ours - theirs).abs().max() <= 1e-9 for ours, theirs in zip(*found, strict=True))
    assert decoder.release().config._attn_implementation == "sdpa"
